"""What calibrated rounding gains on TinyWan if every layer is rounded for what the quantized layers before it give."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from statistics import fmean

import torch
from torch import Tensor

from wanquant.bench.tinywan.data import TRAINING, Caption
from wanquant.bench.tinywan.equivalents import reordered
from wanquant.bench.tinywan.reference import (
    CHECKPOINT,
    Errors,
    Gain,
    Reference,
    Weights,
    gains,
    load_model,
    load_module,
    load_weights,
    prompts,
)
from wanquant.bench.tinywan.results import add_options, conclude, origin, table
from wanquant.bench.tinywan.tuning import Call, block_inputs
from wanquant.quant.conversion.layer_encoder import Inputs
from wanquant.quant.plan.recipe import find_recipe, plan
from wanquant.quant.qtype import QuantType
from wanquant.quant.sources.checkpoint import open_checkpoint
from wanquant.quant.statistics.calibration import Calibration, sum_of_products

RECIPES = ("Q4_K_M", "Q3_K_M", "Q2_K")
# Layers of one stage do not take anything from each other.
_STAGES = (
    ("self_attn.q", "self_attn.k", "self_attn.v"),
    ("self_attn.o",),
    ("cross_attn.q", "cross_attn.k", "cross_attn.v"),
    ("cross_attn.o",),
    ("ffn.0",),
    ("ffn.2",),
)
# Neighbouring tokens say nearly the same.
_EVERY = 4
# Of the mean square of the inputs.
_RIDGE = 0.05


@dataclass(frozen=True)
class Gained:
    """Calibrated files of a recipe, in dB, and how much closer sequential ones are."""

    recipe: str
    calibrated: dict[str, float]
    """Means, by the names of `Errors.means`."""
    gains: dict[str, Gain]


class _Seen(Exception):  # noqa: N818 - not an error
    """The last layer that was asked for has its inputs."""


@torch.no_grad()
def encode(
    source: Weights, types: Mapping[str, QuantType], captions: Sequence[Caption], *, sequential: bool
) -> Weights:
    """The weights of a calibrated file of these types.

    Args:
        sequential: each layer is to give, from what the quantized layers before it give, what it gave before.
    """
    exact, packed = load_module(source), load_module(source)
    calls, weights = block_inputs(exact, captions), dict(source)
    wanted = given = [call.tokens for call in calls]
    for index, (block, quantized) in enumerate(zip(exact.blocks, packed.blocks, strict=True)):
        unquantized = layer_inputs(block, wanted, calls, [layer for stage in _STAGES for layer in stage])
        for stage in _STAGES:
            inputs = layer_inputs(quantized, given, calls, stage) if sequential else unquantized
            for layer in stage:
                name = f"blocks.{index}.{layer}.weight"
                target = corrected(source[name], unquantized[layer], inputs[layer]) if sequential else source[name]
                weights[name] = rounded(types[name], target, inputs[layer])
                quantized.get_submodule(layer).weight.copy_(weights[name])
        wanted = outputs(block, wanted, calls)
        given = outputs(quantized, given, calls) if sequential else wanted
    return weights


def outputs(block: torch.nn.Module, tokens: Sequence[Tensor], calls: Sequence[Call]) -> list[Tensor]:
    return [block(part, **call.others) for part, call in zip(tokens, calls, strict=True)]


def layer_inputs(
    block: torch.nn.Module, tokens: Sequence[Tensor], calls: Sequence[Call], layers: Sequence[str]
) -> dict[str, Tensor]:
    """(rows, columns) of some layers that a block runs in this order."""
    rows: dict[str, list[Tensor]] = {layer: [] for layer in layers}

    def keep(layer: str, inputs: Tensor) -> None:
        rows[layer].append(inputs.flatten(0, 1)[::_EVERY])
        if layer == layers[-1]:
            raise _Seen

    hooks = [
        block.get_submodule(layer).register_forward_pre_hook(lambda _, inputs, layer=layer: keep(layer, inputs[0]))
        for layer in layers
    ]
    for part, call in zip(tokens, calls, strict=True):
        try:
            block(part, **call.others)
        except _Seen:
            continue
    for hook in hooks:
        hook.remove()
    return {layer: torch.cat(parts) for layer, parts in rows.items()}


def corrected(weight: Tensor, unquantized: Tensor, inputs: Tensor) -> Tensor:
    """The weight (rows, columns) whose outputs for `inputs` are nearest to those of `weight` for unquantized ones.

    Source: GPTAQ (arXiv 2504.02692), whose asymmetric objective it solves before rounding, in ridge regression.
    """
    moments = inputs.mT @ inputs
    moments.diagonal().add_(_RIDGE * moments.diagonal().mean())
    missing = weight @ ((unquantized - inputs).mT @ inputs)
    return weight + torch.linalg.solve(moments, missing.mT).mT


def rounded(qtype: QuantType, weight: Tensor, inputs: Tensor) -> Tensor:
    """As a conversion with a calibration of these inputs does."""
    products = sum_of_products(inputs)
    sums = products.diagonal(dim1=1, dim2=2).flatten()
    calibration = Calibration({"": sums}, {"": len(inputs)}, 1, products={"": products})
    return qtype.dequantize(Inputs.of(calibration, "").quantize(qtype, weight))


def measure(recipes: Sequence[str], roundings: int, clips: int, captions: int) -> list[Gained]:
    """So many networks, each with clips of its own."""
    files: dict[tuple[str, bool], list[Errors]] = defaultdict(list)
    with open_checkpoint(CHECKPOINT) as checkpoint:
        types = {recipe: plan(find_recipe(recipe), checkpoint.tensors).types for recipe in recipes}
    for order in range(roundings):
        reference, source = Reference.sample(clips, order), reordered(load_weights(), order)
        for recipe, sequential in product(recipes, (False, True)):
            weights = encode(source, types[recipe], prompts(captions), sequential=sequential)
            files[recipe, sequential].append(reference.errors(load_model(weights)))
    return [_gained(recipe, files[recipe, False], files[recipe, True]) for recipe in recipes]


def _gained(recipe: str, calibrated: Sequence[Errors], sequential: Sequence[Errors]) -> Gained:
    found = gains(sequential, calibrated)
    return Gained(recipe, {key: fmean(file.means[key] for file in calibrated) for key in found}, found)


def text(rows: Sequence[Gained]) -> str:
    """The table: calibrated files, and in brackets the gain."""
    cells = [(row.recipe, *(f"{row.calibrated[key]:.1f} ({gain})" for key, gain in row.gains.items())) for row in rows]
    return table(("recipe", *rows[0].gains), cells)


def main() -> None:
    parser = argparse.ArgumentParser(prog="dev.py bench sequential", description=__doc__)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--roundings", type=int, default=3, help="networks, equal but for the order of their channels")
    parser.add_argument("--seeds", type=int, default=16, help="clips for each of them")
    parser.add_argument("--prompts", type=int, default=len(TRAINING) // 2, help="captions to calibrate on")
    add_options(parser)
    options = parser.parse_args()
    rows = measure(options.recipes, options.roundings, options.seeds, options.prompts)
    settings = {**origin(), "roundings": options.roundings, "seeds": options.seeds, "prompts": options.prompts}
    conclude(options, "sequential", {**settings, "rows": [asdict(row) for row in rows]}, text(rows))


if __name__ == "__main__":
    main()
