"""Captures the arguments of a model's first block while the model samples."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...quant import QuantError
from ...quant.tuning.capture import Capture
from .. import host
from ..observed import Evaluation, with_observer, without_compilation
from ..packed.layout import dense

_KEY = "wanquant.capture"
OPTIONS = "transformer_options"
"""The argument of a block that holds objects of the host; tuning passes its own."""

TUNABLE = ("WanModel", "CameraWanModel")
"""ComfyUI's classes in which nothing but blocks changes the hidden state between the first block and the last."""


def with_capture(patcher: ModelPatcher, capture: Capture) -> ModelPatcher:
    """Return a clone of the model that adds the arguments of its first block to `capture` in every evaluation.

    Raises:
        QuantError: not a Wan transformer, or one whose blocks are not a plain chain.
    """
    check_tunable(patcher.model.diffusion_model)
    return with_observer(patcher, _KEY, partial(_capturing, capture))


def check_tunable(model: torch.nn.Module) -> None:
    """Refuse a model that is not a plain chain of Wan's blocks.

    Raises:
        QuantError: it is not.
    """
    kind = type(model).__name__
    if kind not in TUNABLE:
        raise QuantError(
            f"MODEL: is a {kind}, which cannot be tuned block by block, expected {' or '.join(TUNABLE)}; convert it"
            " with Convert to Quantized Model"
        )


def signature(model: Any) -> Tensor:  # noqa: ANN401
    """Return what tells one model from another whatever the types of its weights: float32, (blocks, values).

    These are the modulations, which no conversion quantizes.
    """
    modulations = (dense(block.modulation.detach(), torch.float32) for block in model.blocks)
    return torch.stack([modulation.flatten().to("cpu", torch.float32) for modulation in modulations])


@contextmanager
def _capturing(capture: Capture, evaluation: Evaluation) -> Iterator[None]:
    _refuse_patches(evaluation.options)
    model: Any = evaluation.model
    first = without_compilation(model.blocks[0])
    hook = first.register_forward_pre_hook(partial(_add, capture, model), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _refuse_patches(options: dict[str, Any]) -> None:
    replaced, patched = options.get("patches_replace", {}), options.get("patches", {})
    found = next((name for name, added in (*replaced.items(), *patched.items()) if added), None)
    if found is not None:
        raise QuantError(
            f"MODEL: another node patches its blocks ({found!r:.40}), expected the blocks alone; connect the model to"
            " Collect Importance Matrix before that node"
        )


def _add(
    capture: Capture,
    model: torch.nn.Module,
    block: torch.nn.Module,
    inputs: tuple[Any, ...],
    keywords: dict[str, Any],
) -> None:
    call = inspect.signature(type(block).forward).bind(block, *inputs, **keywords)
    arguments = {name: _inside(value) for name, value in list(call.arguments.items())[1:] if name != OPTIONS}
    known = capture.signature is not None
    with host.outside_graphs():
        capture.add(arguments, capture.signature if known else signature(model))  # type: ignore[arg-type]


def _inside(value: Any) -> Any:  # noqa: ANN401
    """Return a tensor without the container in which newer hosts pass it (0.38 on)."""
    return value.peek() if hasattr(value, "take") and hasattr(value, "peek") else value
