"""Correction of the gain of quantized rows, so that the outputs of a layer do not shrink.

Rounding to the nearest representable values shrinks a row: the projection of the quantized row on the original one is
too short, by a fraction that equals the relative squared error. Errors of random sign average out over input channels
and layers, but this shrinkage accumulates. `restore_gain` therefore scales each row back, through the float16 scales of
its blocks.

A scale that minimizes the squared error cuts off the largest weights. One gain per row would make up for that by
enlarging all other weights. Input channels with large weights would then count too little, all others too much. So the
errors of large weights count more when the scales are chosen: see `error_weights`.

Some types have one float16 factor for the scales and another one for the minima. For these, the sum of each row is
restored too, because scaling with the first factor alone would change it. Inputs behind an activation function have a
mean other than 0, so the sum of a row matters.

Weights in ComfyUI's own formats have their gain restored by `restore_gain_of_layer`, through a float32 scale: one for
each row, or one for the weight in NVFP4. FP8 and MXFP8 are left as they are: floats of many sizes hardly shrink a row.

Source: arXiv 1810.05723, section 4.2, which corrects the norms of channels; here, projections of rows are corrected.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.bits import read_factor, write_factor
from ..native.float8 import power_near
from ..native.layer_type import LayerType
from ..native.native_format import by_rows, largest
from ..qtype import QuantType
from ..squares import total_of

_MAX_CHANGE = 0.5
"""The largest relative change of a factor when gain and sum are both restored, and of a scale of ComfyUI's formats.

The two equations are nearly dependent for rows that would need more; only their gain is restored.
"""


def error_weights(weight: Tensor, importance: Tensor | None = None) -> Tensor:
    """Return how much the squared error of each weight counts when the scale of its block is chosen.

    Args:
        weight: float32, (out_features, in_features).
        importance: float32, (in_features,), the mean square of each input channel; None is 1 for all.

    Returns:
        float32, (out_features, in_features): |w| plus the root mean square of the row, times `importance`.

    Source: the weights of quantize_row_q4_K_ref, ggml-quants.c @ ggml 0.15.3, here over a row instead of a block.
    """
    size = weight.abs()
    size += weight.square().mean(1, keepdim=True).sqrt()
    return size if importance is None else size * importance


def restore_gain(qtype: QuantType, packed: Tensor, weight: Tensor, importance: Tensor | None = None) -> Tensor:
    """Scale the float16 factors of each row so that the gain of the row, and its sum if possible, is that of `weight`.

    The gain of a row is its inner product with the same row of `weight`.

    Args:
        qtype: the type of `packed`; without float16 factors, nothing changes.
        packed: uint8, (out_features, bytes per row); modified in place.
        weight: float32, (out_features, in_features), the tensor that was quantized.
        importance: float32, (in_features,), the mean square of each input channel; None is 1 for all. It weights
            the inner products, and its square root weights the sums.

    Returns:
        `packed`.
    """
    if not qtype.block.factors:
        return packed
    weighted, magnitudes = (weight, 1.0) if importance is None else (weight * importance, importance.sqrt())
    dequantized = qtype.dequantize(packed)
    products, wanted = (weighted * dequantized).sum(1), (weighted * weight).sum(1)
    gains = torch.where(products > 0, wanted / products, 1.0).expand(len(qtype.block.factors), -1)
    if len(qtype.block.factors) == 2:
        # The contributions of the scales alone; the minima contribute the rest.
        scaled = qtype.dequantize(_without_factor(packed, qtype, qtype.block.factors[1]))
        product, total = (weighted * scaled).sum(1), (magnitudes * scaled).sum(1)
        matrix = torch.stack([product, products - product, total, (magnitudes * dequantized).sum(1) - total])
        both = _solve(matrix, wanted, (magnitudes * weight).sum(1))
        gains = torch.where(((both - 1).abs() < _MAX_CHANGE).all(0), both, gains)
    blocks = packed.view(-1, qtype.type_size)
    for place, gain in zip(qtype.block.factors, gains, strict=True):
        changed = read_factor(blocks, place).view(len(packed), -1) * gain[:, None]
        write_factor(blocks, place, changed.clamp_(-65504.0, 65504.0).view(-1, 1))
    return packed


def restore_gain_of_layer(qtype: LayerType, packed: Tensor, weight: Tensor, importance: Tensor | None = None) -> Tensor:
    """Scale the free scale of a weight in one of ComfyUI's own formats, so that its gain is that of `weight`.

    Args:
        qtype: the type of `packed`; without a free scale, nothing changes.
        packed: uint8, of any shape.
        weight: float32, (out_features, in_features), the tensor that was quantized.
        importance: float32, (in_features,), the mean square of each input channel; None is 1 for all.

    Returns:
        uint8, (n,): the bytes of all parts.
    """
    if not qtype.format.free_scale:
        return packed
    # Products of very large or small weights would leave the range of float32.
    unit, factors = power_near(largest(weight)), 1.0 if importance is None else importance

    def inner_products(rows: Tensor, dequantized: Tensor) -> tuple[Tensor, ...]:
        rows = rows / unit
        weighted = rows * factors
        return (weighted * (dequantized / unit)).sum(1), (weighted * rows).sum(1)

    products, wanted = by_rows(inner_products, weight, qtype.dequantize(packed), columns=weight.shape[1])
    parts = dict(qtype.split(packed))
    scale = parts[qtype.format.free_scale]
    if scale.ndim == 0:
        products, wanted = (torch.full_like(scale, total_of(sums)) for sums in (products, wanted))
    gains = wanted / products
    gains = torch.where((gains - 1).abs() < _MAX_CHANGE, gains, 1.0)
    return qtype.join(parts | {qtype.format.free_scale: scale * gains.view(scale.shape)})


def _without_factor(packed: Tensor, qtype: QuantType, place: int | tuple[int, ...]) -> Tensor:
    """Return a copy in which this factor of each block is 0."""
    blocks = packed.view(-1, qtype.type_size).clone()
    write_factor(blocks, place, torch.zeros(len(blocks), 1, device=blocks.device))
    return blocks.view_as(packed)


def _solve(matrix: Tensor, gain: Tensor, total: Tensor) -> Tensor:
    """Solve [[a, b], [c, d]] x = [gain, total] for every row; (2, rows), not finite where there is no solution."""
    a, b, c, d = matrix
    solution: Tensor = torch.stack([gain * d - b * total, a * total - c * gain]) / (a * d - b * c)
    return solution
