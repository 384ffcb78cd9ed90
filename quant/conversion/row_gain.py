"""Rows as strong as they were. The nearest quantized values are weaker than the weights: by a share of the row that is
its relative squared error. Errors of random signs average out over columns and layers, but such a loss adds up.

Scales of least squared error cut the largest weights most, and a gain for the whole row makes up for these with the
others. Inputs that meet large weights then see too little, all others too much. So large weights count more in the fit.

Types with a factor for the scales and one for the minima keep the row's sum as well, which the first alone would spoil:
inputs behind an activation function have a mean.

Source: arXiv 1810.05723, section 4.2, which corrects the norms of channels; here it is what a row gives for itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.bits import half, half_bytes
from ..qtype import QuantType

_LARGEST = 0.5
"""Of a change of a factor; rows that ask for more, whose parts hardly differ, keep only their strength."""


def emphasis(weight: Tensor, importance: Tensor | None = None) -> Tensor:
    """How much each weight (rows, columns) counts in the squared error that its scale is chosen by, of the same shape.

    Args:
        importance: (columns,) mean square of the inputs, or 1.

    Source: the weights of quantize_row_q4_K_ref, ggml-quants.c @ ggml 0.15.3, over a row.
    """
    size = weight.abs()
    size += weight.square().mean(1, keepdim=True).sqrt()
    return size if importance is None else size * importance


def restore_gain(qtype: QuantType, packed: Tensor, weight: Tensor, importance: Tensor | None = None) -> Tensor:
    """Scales the factors of each row so that its product with the weights is that of the weights with themselves.

    Args:
        packed: uint8 (rows, bytes of a row), written to; it stays as it is where the type has no float16 factors.
        weight: float32 (rows, columns), what was packed.
        importance: (columns,) mean square of the inputs: it weights the products, and its root the sums.
    """
    if not qtype.block.factors:
        return packed
    weights, means = (weight, 1.0) if importance is None else (weight * importance, importance.sqrt())
    decoded = qtype.dequantize(packed)
    products, wanted = (weights * decoded).sum(1), (weights * weight).sum(1)
    gains = torch.where(products > 0, wanted / products, 1.0).expand(len(qtype.block.factors), -1)
    if len(qtype.block.factors) == 2:
        first = qtype.dequantize(_without(packed, qtype, qtype.block.factors[1]))
        of_first, sum_of_first = (weights * first).sum(1), (means * first).sum(1)
        rows = torch.stack([of_first, products - of_first, sum_of_first, (means * decoded).sum(1) - sum_of_first])
        both = _solve(rows, wanted, (means * weight).sum(1))
        gains = torch.where(((both - 1).abs() < _LARGEST).all(0), both, gains)
    blocks = packed.view(len(packed), -1, qtype.type_size)
    for offset, gain in zip(qtype.block.factors, gains, strict=True):
        field = blocks[..., offset : offset + 2]
        changed = half(field.contiguous()) * gain.view(-1, 1, 1)
        field.copy_(half_bytes(changed.clamp_(-65504.0, 65504.0)))
    return packed


def _without(packed: Tensor, qtype: QuantType, offset: int) -> Tensor:
    """A copy with the factor at this offset of each block zero."""
    blocks = packed.view(len(packed), -1, qtype.type_size).clone()
    blocks[..., offset : offset + 2] = 0
    return blocks.view_as(packed)


def _solve(matrix: Tensor, strength: Tensor, total: Tensor) -> Tensor:
    """The two gains (2, rows) of [[a, b], [c, d]] times gains = [strength, total]; not finite where there are none."""
    a, b, c, d = matrix
    gains: Tensor = torch.stack([strength * d - b * total, a * total - c * strength]) / (a * d - b * c)
    return gains
