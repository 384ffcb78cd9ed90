"""Calibrated rounding of each layer for the outputs of the quantized layers before it.

Calibrated rounding takes the inputs of a layer from the unquantized model. Here they come from the layers that are
quantized already, and a ridge regression first corrects the weight for their errors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from wanquant.bench.tinywan.data import TRAINING, Caption
from wanquant.bench.tinywan.equivalents import reordered
from wanquant.bench.tinywan.reference import (
    CHECKPOINT,
    Reference,
    Weights,
    load_model,
    load_module,
    load_weights,
    prompts,
)
from wanquant.quant.conversion.layer_encoder import LayerEncoder
from wanquant.quant.plan.recipe import find_recipe, plan_types
from wanquant.quant.qtype import QuantType
from wanquant.quant.sources.checkpoint import open_checkpoint
from wanquant.quant.statistics.calibration import Calibration, gram_blocks
from wanquant.research._shared import RESULTS, Call, Pair, block_inputs, run

# Layers of one stage do not read each other's outputs.
_STAGES = (
    ("self_attn.q", "self_attn.k", "self_attn.v"),
    ("self_attn.o",),
    ("cross_attn.q", "cross_attn.k", "cross_attn.v"),
    ("cross_attn.o",),
    ("ffn.0",),
    ("ffn.2",),
)
# One token in this many is used: neighbors are nearly equal.
_EVERY = 4
# The ridge, relative to the mean square of the inputs.
_RIDGE = 0.05


class _Seen(Exception):  # noqa: N818 - not an error
    """Raised to leave the forward pass when the last wanted layer has been reached."""


@torch.no_grad()
def encode(
    source: Weights, types: Mapping[str, QuantType], captions: Sequence[Caption], *, sequential: bool
) -> Weights:
    """Return the dequantized weights of a calibrated file.

    Args:
        source: the unquantized weights, float32.
        types: by the name of the weight.
        captions: one clip of each is sampled to calibrate on.
        sequential: take the inputs of a layer from the quantized layers before it, and correct its weight for them.
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
    """Return the inputs of some layers, in the order in which the block runs them: float32, (rows, columns)."""
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
    """Return the weight whose outputs for `inputs` are nearest to those of `weight` for `unquantized` inputs.

    Args:
        weight: float32, (rows, columns).
        unquantized: float32, (n, columns), the inputs in the unquantized model.
        inputs: float32, (n, columns), the inputs in the quantized model.

    Source: GPTAQ (arXiv 2504.02692), whose asymmetric objective it solves before rounding, in ridge regression.
    """
    moments = inputs.mT @ inputs
    moments.diagonal().add_(_RIDGE * moments.diagonal().mean())
    missing = weight @ ((unquantized - inputs).mT @ inputs)
    return weight + torch.linalg.solve(moments, missing.mT).mT


def rounded(qtype: QuantType, weight: Tensor, inputs: Tensor) -> Tensor:
    """Round a weight (rows, columns) as a conversion does that is calibrated on these inputs (n, columns)."""
    products = gram_blocks(inputs)
    sums = products.diagonal(dim1=1, dim2=2).flatten()
    calibration = Calibration({"": sums}, {"": len(inputs)}, 1, products={"": products})
    return qtype.dequantize(LayerEncoder.of(calibration, "").quantize(qtype, weight))


def measure(recipes: Sequence[str], roundings: int, clips: int, captions: int) -> dict[str, list[Pair]]:
    """Return the errors of files that are rounded in parallel and in sequence, by recipe."""
    pairs = defaultdict(list)
    with open_checkpoint(CHECKPOINT) as checkpoint:
        types = {recipe: plan_types(find_recipe(recipe), checkpoint.tensors).types for recipe in recipes}
    for order in range(roundings):
        reference, source = Reference.sample(clips, order), reordered(load_weights(), order)
        for recipe in recipes:
            calibrated, sequential = (
                reference.errors(load_model(encode(source, types[recipe], prompts(captions), sequential=way)))
                for way in (False, True)
            )
            pairs[recipe].append((calibrated, sequential))
    return pairs


def main() -> None:
    defaults = {"recipes": ["Q4_K_M", "Q3_K_M", "Q2_K"], "roundings": 3, "seeds": 16, "prompts": len(TRAINING) // 2}
    run(__doc__, RESULTS / "sequential.json", measure, **defaults)


if __name__ == "__main__":
    main()
