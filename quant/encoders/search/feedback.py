"""Rounding that makes up for its own errors: what a column loses, the columns behind it take back in the outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from .columns import Columns, inverse
from .encoders import Encoder
from .fit import Blocks


def encode_with_feedback(
    encode: Encoder, block_size: int, weight: Tensor, importance: Tensor, factors: Tensor
) -> Tensor:
    """Each block gets its scales when its turn comes, and then its columns are rounded to them one after the other.

    Every error is spread over the columns behind it as is best for the outputs. All is done one column and one element
    at a time, so that the bytes of a row do not depend on other rows or on threads.

    Args:
        weight: float32 (rows, columns).
        importance: of each weight in the choice of the scales, float32 (rows, columns).
        factors: float32 (n, span, span), the upper Cholesky factor of the inverse second moments of the inputs, for n
            runs of columns that are rounded on their own; `block_size` divides `span`.

    Returns:
        uint8 (rows, bytes of a row).

    Source: GPTQ (arXiv 2210.17323), algorithm 1, in the order of the columns.
    """
    n, span, _ = factors.shape
    rows = len(weight)
    left = weight.view(rows, n, span).permute(1, 2, 0).clone(memory_format=torch.contiguous_format)
    weights = importance.reshape(rows, n, span).transpose(0, 1)
    packed = []
    for start in range(0, span, block_size):
        stop = start + block_size
        blocks = left[:, start:stop].transpose(1, 2).reshape(-1, block_size)
        columns = Columns.of(blocks, weights[:, :, start:stop].reshape(-1, block_size), encode.size)
        found = encode.fit(columns, len(blocks))
        levels = _round(encode, found, left[:, start:], factors[:, start:, start:], block_size)
        packed.append(encode.encode(found, levels.transpose(1, 2).reshape(-1, block_size)).view(n, rows, -1))
    return torch.stack(packed, 2).transpose(0, 1).reshape(rows, -1)


def _round(encode: Encoder, found: Blocks, left: Tensor, factors: Tensor, block_size: int) -> Tensor:
    """The levels of the first `block_size` columns of `left`, (n, columns, rows), which takes their errors."""
    n, _, rows = left.shape
    scales, mins = (line.view(n, rows, -1).permute(2, 0, 1).contiguous() for line in found.lines())
    units = inverse(scales)
    levels = torch.empty_like(left[:, :block_size])
    for column in range(block_size):
        scale, minimum, unit = (values[column // encode.size] for values in (scales, mins, units))
        raised = left[:, column] + minimum
        levels[:, column] = encode.levels.nearest(raised * unit)
        error = raised.addcmul_(levels[:, column], scale, value=-1).div_(factors[:, column, column, None])
        left[:, column + 1 :].addcmul_(factors[:, column, column + 1 :, None], error[:, None], value=-1)
    return levels
