"""Rows as strong as they were. The nearest quantized values are weaker than the weights: by a share of the row that is
its relative squared error. Errors of random signs average out over columns and layers, but such a loss adds up.

Source: arXiv 1810.05723, section 4.2, which corrects the norms of channels; here it is what a row gives for itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bits import half, half_bytes
from .qtype import QuantType


def restore_gain(qtype: QuantType, packed: Tensor, weight: Tensor, importance: Tensor | None = None) -> Tensor:
    """Scales each row so that its product with the weights is that of the weights with themselves.

    Args:
        packed: uint8 (rows, bytes of a row), written to; it stays as it is where the type has no float16 factors.
        weight: float32 (rows, columns), what was packed.
        importance: (columns,) weight of each column in both products.
    """
    if not qtype.factors:
        return packed
    weights = weight if importance is None else weight * importance
    products = (weights * qtype.dequantize(packed)).sum(1)
    gain = torch.where(products > 0, (weights * weight).sum(1) / products, 1.0).view(-1, 1, 1)
    blocks = packed.view(len(packed), -1, qtype.type_size)
    for offset in qtype.factors:
        field = blocks[..., offset : offset + 2]
        field.copy_(half_bytes(half(field.contiguous()) * gain))
    return packed
