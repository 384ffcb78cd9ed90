"""Collects an importance matrix while a model samples, whether its weights are packed or not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..quant.sources.names import unwrapped
from ..quant.statistics.importance import Collector
from . import host
from .observed import Evaluation, with_observer

_KEY = "wanquant.importance"


def with_collector(patcher: ModelPatcher, collector: Collector, *, by_step_size: bool = False) -> ModelPatcher:
    """Return a clone of the model that adds the inputs of its Linears to `collector` in every evaluation.

    Args:
        patcher: the model, from any loader.
        collector: sums up the inputs.
        by_step_size: weight a step by the square of the noise that it removes, because an error in it changes the
            result that much. Otherwise all evaluations have the same weight.
    """
    return with_observer(patcher, _KEY, partial(_collecting_evaluation, collector, by_step_size))


@contextmanager
def _collecting_evaluation(collector: Collector, by_step_size: bool, evaluation: Evaluation) -> Iterator[None]:
    sigmas = evaluation.options.get("sample_sigmas")
    weight = step_size(evaluation.t, sigmas) ** 2 if by_step_size else 1.0
    with collecting(evaluation.model, collector, weight):
        yield
    collector.samples += len(evaluation.x)


@contextmanager
def collecting(model: torch.nn.Module, collector: Collector, weight: float = 1.0) -> Iterator[None]:
    """Add the inputs of all Linears of the model to `collector` until the context ends.

    Open it for one evaluation only, because other clones share the layers and so the hooks.

    Args:
        model: the transformer.
        collector: sums up the inputs.
        weight: the factor of this evaluation in the sums.
    """
    # Linears of the host's quantized models are not torch.nn.Linear, but all have `in_features`.
    named = (item for item in model.named_modules() if hasattr(item[1], "in_features"))
    layers = {unwrapped(f"{name}.weight"): module for name, module in named}
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
    """Return forwards with which the host calls every layer, and so the layer's hooks.

    Without them the host computes some layers together with their activation.
    """
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
    """Return the share of the noise that the step at `t` removes, or 1 without a schedule.

    Args:
        t: the noise level of the evaluation, floating point, (batch,).
        sigmas: the noise levels of the schedule, floating point, (steps + 1,), or None.
    """
    if sigmas is None or len(sigmas) < 2:
        return 1.0
    sigmas = sigmas.to("cpu", torch.float32)
    step = int((sigmas[:-1] - t.flatten()[0].to("cpu", torch.float32)).abs().argmin())
    return ((sigmas[step] - sigmas[step + 1]) / sigmas[0]).abs().item()
