"""Collects an importance matrix while a model samples, packed or not."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import Tensor

from ..quant.importance import Collector

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
    """Wraps `BaseModel.apply_model`. The hooks last for one evaluation only: other clones share the layers."""
    weight = step_size(t, transformer_options.get("sample_sigmas")) ** 2 if by_step_size else 1.0
    layers = executor.class_obj.diffusion_model.named_modules()
    hooks = [
        # Any module with the width of a Linear: those of quantized models of the host are no torch.nn.Linear.
        module.register_forward_pre_hook(partial(_add, collector, f"{name}.weight", weight))
        for name, module in layers
        if hasattr(module, "in_features")
    ]
    try:
        output: Tensor = executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    collector.samples += len(x)
    return output


def _add(collector: Collector, name: str, weight: float, _: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
    collector.add(name, inputs[0], weight)


def step_size(t: Tensor, sigmas: Tensor | None) -> float:
    """The share of the noise that the step at `t` takes away; 1 outside of a schedule."""
    if sigmas is None or len(sigmas) < 2:
        return 1.0
    sigmas = sigmas.to("cpu", torch.float32)
    step = int((sigmas[:-1] - t.flatten()[0].to("cpu", torch.float32)).abs().argmin())
    return ((sigmas[step] - sigmas[step + 1]) / sigmas[0]).abs().item()
