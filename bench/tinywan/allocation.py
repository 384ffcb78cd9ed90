"""Types of TinyWan's layers at the bytes of a recipe, chosen in several ways, also by half of the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from wanquant.bench.tinywan.equivalents import reordered
from wanquant.bench.tinywan.model import Model
from wanquant.bench.tinywan.reference import CHECKPOINT, Weights, collect, load_model, load_weights, prompts
from wanquant.quant.conversion.layer_encoder import LayerEncoder
from wanquant.quant.plan import target_size as budget
from wanquant.quant.plan.recipe import RECIPES, plan_types, required_precision
from wanquant.quant.plan.target_size import ParetoFront
from wanquant.quant.qtype import QuantType
from wanquant.quant.sources.checkpoint import open_checkpoint
from wanquant.quant.statistics.importance import Collector, Importance

HALVES = ("high", "low")
"""Halves of the schedule by noise level, as the two experts of Wan 2.2 share it: 5 and 3 of 8 steps."""
_BORDER = 0.875

Fronts = Mapping[str, ParetoFront]


@dataclass(frozen=True, eq=False)
class Choice:
    """The types of a file, and the part of the steps whose importance it is encoded with (a half, or "all")."""

    part: str
    types: Mapping[str, QuantType]


Split = Mapping[str, Choice]
"""The file of each half."""


def half_of(level: float) -> str:
    return "high" if level > _BORDER else "low"


def by_half(models: Mapping[str, Model]) -> Model:
    """Return a model that runs each step by the model of its half."""

    def call(x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return models[half_of(timestep[0].item() / 1000)](x, timestep, text)

    return call


@dataclass(frozen=True)
class Network:
    """TinyWan with its channels in some order, and their importance as inputs, by half and over "all" steps."""

    source: Weights
    importance: Mapping[str, Importance]

    @classmethod
    def of(cls, captions: int, order: int = 0) -> Network:
        source = reordered(load_weights(), order)
        wanted = {"all": lambda level: True} | {
            half: lambda level, half=half: half_of(level) == half for half in HALVES
        }
        return cls(
            source,
            {part: collect(source, prompts(captions), Collector(), wanted=wants)[0] for part, wants in wanted.items()},
        )

    def quantized(self, split: Split) -> Model:
        """Return the model that runs each half with its file; weights without a type stay unquantized."""
        models = {choice: load_model(self._encoded(choice)) for choice in set(split.values())}
        return by_half({half: models[choice] for half, choice in split.items()})

    def _encoded(self, choice: Choice) -> Weights:
        weights = dict(self.source)
        for name, qtype in choice.types.items():
            encoder = LayerEncoder(self.importance[choice.part][name])
            weights[name] = qtype.dequantize(encoder.quantize(qtype, weights[name]))
        return weights


@dataclass(frozen=True)
class Allocator:
    """A choice of types for the weights that recipes quantize.

    Attributes:
        fronts: by half, and over "all" steps.
        types: by recipe.
        probed: by name, the error of the weight at which its sensitivity was measured.
    """

    network: Network
    fronts: Mapping[str, Fronts]
    types: Mapping[str, Mapping[str, QuantType]]
    probed: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, network: Network) -> Allocator:
        with open_checkpoint(CHECKPOINT) as checkpoint:
            tensors = {n: t for n, t in checkpoint.tensors.items() if required_precision(n, t) == "quantized"}
            fronts = {
                part: budget.measure(tensors, values, "fast", torch.device("cpu"), lambda tensor: None)
                for part, values in network.importance.items()
            }
            types = {name: plan_types(recipe, tensors).types for name, recipe in RECIPES.items()}
        return cls(network, fronts, types)

    def with_errors(self, errors: Mapping[str, Tensor]) -> Allocator:
        """Return a copy with the errors of the weights at which sensitivities were measured."""
        return replace(self, probed=errors)

    def of_recipe(self, recipe: str) -> Split:
        return _shared(self.types[recipe])

    def of_size(self, recipe: str) -> Split:
        """Choose as the converter does for a target size."""
        return _shared(self._chosen(self.fronts["all"], self._bytes(recipe)))

    def by_sensitivity(self, recipe: str, measured: Mapping[str, Mapping[str, float]]) -> Split:
        totals = {name: sum(halves.values()) for name, halves in measured.items()}
        return _shared(self._chosen(self._scaled("all", totals), self._bytes(recipe)))

    def by_half(self, recipe: str, measured: Mapping[str, Mapping[str, float]], *, shared: bool = False) -> Split:
        """Choose a file for each half: both of the recipe's bytes, or twice these bytes in sum if `shared`."""
        parts = {half: self._scaled(half, {name: halves[half] for name, halves in measured.items()}) for half in HALVES}
        nbytes = self._bytes(recipe)
        if shared:
            both = {f"{half}/{name}": front for half, fronts in parts.items() for name, front in fronts.items()}
            chosen = self._chosen(both, len(HALVES) * nbytes)
            types = {half: {name: chosen[f"{half}/{name}"] for name in measured} for half in HALVES}
        else:
            types = {half: self._chosen(fronts, nbytes) for half, fronts in parts.items()}
        return {half: Choice(half, types[half]) for half in HALVES}

    def _scaled(self, part: str, measured: Mapping[str, float]) -> Fronts:
        """Scale the fronts to the measured sensitivities; the rules that replace a measurement do not apply."""
        scales = {name: value / self._probed_error(part, name) for name, value in measured.items()}
        return {
            name: ParetoFront.of([option._replace(error=option.error * scales[name]) for option in front.options])
            for name, front in self.fronts[part].items()
        }

    def _probed_error(self, part: str, name: str) -> float:
        """Return the squared error of the layer's outputs relative to the outputs, as in the fronts."""
        importance = self.network.importance[part][name]
        error, output = (x.square().mul(importance).sum() for x in (self.probed[name], self.network.source[name]))
        return (error / output).item()

    def _chosen(self, fronts: Fronts, nbytes: int) -> dict[str, QuantType]:
        return {name: choice.qtype for name, choice in budget.allocate(fronts, nbytes).items()}

    def _bytes(self, recipe: str) -> int:
        types = self.types[recipe]
        return sum(
            math.prod(qtype.packed_shape(tuple(self.network.source[name].shape))) for name, qtype in types.items()
        )


def _shared(types: Mapping[str, QuantType]) -> Split:
    """Return a split with one file for both halves."""
    return dict.fromkeys(HALVES, Choice("all", types))
