"""Observation of a model's evaluations, while any sampler runs it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import Tensor

from . import host


class Evaluation(NamedTuple):
    """One evaluation of a model by a sampler."""

    model: torch.nn.Module
    """The transformer."""
    x: Tensor
    """Floating point, (batch, channels, ...): the latents."""
    t: Tensor
    """Floating point, (batch,): the noise levels."""
    options: dict[str, Any]
    """The host's transformer_options."""


Watch = Callable[[Evaluation], AbstractContextManager[None]]
"""Returns the context in which an evaluation runs."""


def with_observer(patcher: ModelPatcher, key: str, watch: Watch) -> ModelPatcher:
    """Return a clone of the model whose evaluations run in the contexts that `watch` returns.

    Args:
        patcher: the model, from any loader.
        key: the name under which the host keeps the observer.
    """
    observed = patcher.clone()
    observed.add_wrapper_with_key(WrappersMP.APPLY_MODEL, key, partial(_observe, watch))
    return observed


def _observe(
    watch: Watch,
    executor: WrapperExecutor,
    x: Tensor,
    t: Tensor,
    c_concat: Tensor | None,
    c_crossattn: Tensor | None,
    control: object,
    transformer_options: dict[str, Any],
    **kwargs: object,
) -> Tensor:
    """Observe one evaluation; a wrapper of `BaseModel.apply_model`, whose arguments these are."""
    options = host.without_prefetch(transformer_options)
    model = executor.class_obj.diffusion_model
    with _uncompiled(), watch(Evaluation(without_compilation(model), x, t, transformer_options)):
        output: Tensor = executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    return output


def without_compilation(module: torch.nn.Module) -> torch.nn.Module:
    """Return the module that torch.compile has wrapped, or the module itself."""
    wrapped: torch.nn.Module = getattr(module, "_orig_mod", module)
    return wrapped


def _uncompiled() -> AbstractContextManager[Any]:
    """Return a context in which compiled modules run as Python code, so that all hooks are called.

    PyTorch before 2.6 has none.
    """
    set_stance = getattr(torch.compiler, "set_stance", None)
    context: AbstractContextManager[Any] = set_stance("force_eager") if set_stance else nullcontext()
    return context
