"""Types for TinyWan's layers at the bytes of a recipe, chosen in several ways, one model for each half of the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from wanquant.bench.tinywan.model import Model
from wanquant.bench.tinywan.reference import CHECKPOINT, Weights, collect, load_weights, prompts
from wanquant.quant import budget
from wanquant.quant.budget import Front
from wanquant.quant.checkpoint import open_checkpoint
from wanquant.quant.importance import Collector, Importance
from wanquant.quant.inputs import Inputs
from wanquant.quant.qtype import QuantType
from wanquant.quant.recipe import RECIPES, plan, treatment

HALVES = ("high", "low")
"""Of the schedule, by noise, as the two experts of Wan 2.2 share it; of 8 steps they get 5 and 3."""
_BORDER = 0.875

Split = Mapping[str, Weights]
"""Weights by half."""
Fronts = Mapping[str, Front]


def half_of(level: float) -> str:
    return "high" if level > _BORDER else "low"


def by_half(models: Mapping[str, Model]) -> Model:
    """Each step by the model of its half."""

    def call(x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return models[half_of(timestep[0].item() / 1000)](x, timestep, text)

    return call


@dataclass(frozen=True)
class Allocator:
    """Chooses; what is not quantized by recipes stays as it is."""

    names: Sequence[str]
    source: Weights
    importance: Mapping[str, Importance]
    """By half, and of "all" steps."""
    fronts: Mapping[str, Fronts]
    """The same."""
    types: Mapping[str, Mapping[str, QuantType]]
    """Of every recipe."""
    probed: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, captions: int) -> Allocator:
        source = load_weights()
        wanted = {"all": lambda level: True} | {
            half: lambda level, half=half: half_of(level) == half for half in HALVES
        }
        importance = {
            part: collect(source, prompts(captions), Collector(), wanted=choice) for part, choice in wanted.items()
        }
        with open_checkpoint(CHECKPOINT) as checkpoint:
            tensors = {n: t for n, t in checkpoint.tensors.items() if treatment(n, t) == "quantized"}
            fronts = {
                part: budget.measure(tensors, values, "fast", torch.device("cpu"), lambda tensor: None)
                for part, values in importance.items()
            }
            types = {name: plan(recipe, tensors).types for name, recipe in RECIPES.items()}
        return cls(tuple(tensors), source, importance, fronts, types)

    def told(self, errors: Mapping[str, Tensor]) -> Allocator:
        """The same, knowing the errors of the weights at which sensitivities were measured."""
        return replace(self, probed=errors)

    def of_recipe(self, recipe: str) -> Split:
        return self._same(self._encoded(self.types[recipe], "all"))

    def of_size(self, recipe: str) -> Split:
        """As the converter does."""
        return self._same(self._encoded(self._chosen(self.fronts["all"], self._bytes(recipe)), "all"))

    def by_sensitivity(self, recipe: str, measured: Mapping[str, Mapping[str, float]]) -> Split:
        totals = {name: sum(halves.values()) for name, halves in measured.items()}
        return self._same(self._encoded(self._chosen(self._scaled("all", totals), self._bytes(recipe)), "all"))

    def by_half(self, recipe: str, measured: Mapping[str, Mapping[str, float]], *, shared: bool = False) -> Split:
        """A file for each half, of equal bytes or, `shared`, of equal sum."""
        parts = {half: self._scaled(half, {name: halves[half] for name, halves in measured.items()}) for half in HALVES}
        nbytes = self._bytes(recipe)
        if shared:
            both = {f"{half}/{name}": front for half, fronts in parts.items() for name, front in fronts.items()}
            chosen = self._chosen(both, len(HALVES) * nbytes)
            types = {half: {name: chosen[f"{half}/{name}"] for name in self.names} for half in HALVES}
        else:
            types = {half: self._chosen(fronts, nbytes) for half, fronts in parts.items()}
        return {half: self._encoded(types[half], half) for half in HALVES}

    def _scaled(self, part: str, measured: Mapping[str, float]) -> Fronts:
        """Fronts in units of what was measured, without the rules that stand in for a measurement."""
        scales = {
            name: value / (self.probed[name].square() * self.importance[part][name]).sum().item()
            for name, value in measured.items()
        }
        return {
            name: Front.of([choice._replace(error=choice.error * scales[name]) for choice in front.choices])
            for name, front in self.fronts[part].items()
        }

    def _chosen(self, fronts: Fronts, nbytes: int) -> dict[str, QuantType]:
        return {name: choice.qtype for name, choice in budget.allocate(fronts, nbytes).items()}

    def _bytes(self, recipe: str) -> int:
        types = self.types[recipe]
        return sum(math.prod(qtype.packed_shape(tuple(self.source[name].shape))) for name, qtype in types.items())

    def _encoded(self, types: Mapping[str, QuantType], part: str) -> Weights:
        weights = dict(self.source)
        for name, qtype in types.items():
            weights[name] = qtype.dequantize(Inputs(self.importance[part][name]).quantize(qtype, weights[name]))
        return weights

    def _same(self, weights: Weights) -> Split:
        return dict.fromkeys(HALVES, weights)
