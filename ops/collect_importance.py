"""Collects an importance matrix while a model samples, packed or not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import Tensor

from ..quant.statistics.importance import Collector
from . import host

_KEY = "wanquant.importance"


def with_collector(patcher: ModelPatcher, collector: Collector, *, by_step_size: bool = False) -> ModelPatcher:
    """A clone of the model that adds the inputs of its Linears to `collector` in every evaluation.

    Args:
        by_step_size: count a step by the square of the noise that it takes away, since that is how far an error in
            it moves the result; otherwise every evaluation counts alike.
    """
    observed = patcher.clone()
    observed.add_wrapper_with_key(WrappersMP.APPLY_MODEL, _KEY, partial(_observe, collector, by_step_size))
    return observed


def _observe(
    collector: Collector,
    by_step_size: bool,
    executor: WrapperExecutor,
    x: Tensor,
    t: Tensor,
    c_concat: Tensor | None,
    c_crossattn: Tensor | None,
    control: object,
    transformer_options: dict[str, Any],
    **kwargs: object,
) -> Tensor:
    """Wraps `BaseModel.apply_model`."""
    weight = step_size(t, transformer_options.get("sample_sigmas")) ** 2 if by_step_size else 1.0
    options = host.without_prefetch(transformer_options)
    with collecting(executor.class_obj.diffusion_model, collector, weight):
        output: Tensor = executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    collector.samples += len(x)
    return output


@contextmanager
def collecting(model: torch.nn.Module, collector: Collector, weight: float = 1.0) -> Iterator[None]:
    """While open, what each Linear of the model multiplies is added to `collector`.

    The hooks last for one evaluation only: other clones share the layers.
    """
    # Any module with the width of a Linear: those of quantized models of the host are no torch.nn.Linear.
    layers = {f"{name}.weight": module for name, module in model.named_modules() if hasattr(module, "in_features")}
    collector.watched.update(layers)
    hooks = [
        layer.register_forward_pre_hook(partial(_add, collector, name, weight), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        with host.in_place(_one_by_one(model, layers.values())):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _one_by_one(model: torch.nn.Module, layers: Iterable[torch.nn.Module]) -> host.Forwards:
    """Forwards with which the host calls every layer: it folds some with their activation, past the layer's hooks."""
    folded = (m for m in model.modules() if isinstance(m, torch.nn.Sequential) and host.folds_activations(m))
    plain = {module: MethodType(torch.nn.Sequential.forward, module) for module in folded}
    return {layer: layer.forward for layer in layers} | plain


def _add(
    collector: Collector,
    name: str,
    weight: float,
    _: torch.nn.Module,
    inputs: tuple[Any, ...],
    keywords: dict[str, Any],
) -> None:
    with host.outside_graphs():
        collector.add(name, host.linear_input(*inputs, **keywords), weight)


def step_size(t: Tensor, sigmas: Tensor | None) -> float:
    """The share of the noise that the step at `t` takes away; 1 outside of a schedule."""
    if sigmas is None or len(sigmas) < 2:
        return 1.0
    sigmas = sigmas.to("cpu", torch.float32)
    step = int((sigmas[:-1] - t.flatten()[0].to("cpu", torch.float32)).abs().argmin())
    return ((sigmas[step] - sigmas[step + 1]) / sigmas[0]).abs().item()
