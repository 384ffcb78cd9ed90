"""Rounding for the least error of a layer's outputs, by the second moments of its inputs.

The squared error of the outputs is e H e^T for the error e of each row, where H holds the second moments of the inputs
(`moments.py`). Runs of input channels (spans) take turns. In its turn, a span is rounded in two stages:

1. `feedback.py` takes the sub-blocks in the order of their input channels. When the turn of one comes, its scale
   and min are searched for. Its weights are rounded, and the later weights then make up for its errors.
2. `descent.py` goes over the sub-blocks again. Each weight, scale, min and factor gets its best value, given all else.

Any type takes part whose encoder has what `Grid` asks for. Every operation works on one channel of all rows, or is a
sum without rounding errors (`exact.py`). The bytes of a row therefore depend neither on other rows nor on threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .descent import Descent
from .exact import exact_product
from .feedback import Rounded, round_with_feedback
from .grid import Grid, PackedGrid
from .moments import Moments

__all__ = ["BEST", "THOROUGH", "Grid", "Moments", "Rounded", "Thoroughness", "round_for_outputs", "round_spans"]


@dataclass(frozen=True)
class Thoroughness:
    """How much is tried.

    Args:
        neighbors: whether a sub-block also tries the neighbors of the scale and min that its search found.
        sweeps: how often the descent goes over all sub-blocks.
    """

    neighbors: bool
    sweeps: int


BEST = Thoroughness(neighbors=False, sweeps=1)
THOROUGH = Thoroughness(neighbors=True, sweeps=6)


def round_for_outputs(
    grid: PackedGrid, block_size: int, weight: Tensor, importance: Tensor, moments: Moments, how: Thoroughness
) -> Tensor:
    """Quantize a weight for the least squared error of its layer's outputs.

    Args:
        weight: float32 (rows, input channels).
        importance: float32 (rows, input channels), the importance of each weight in the search for a block's scales.
        moments: the second moments of the input channels, in n runs of `span`; `block_size` divides `span`.

    Returns:
        uint8 (rows, bytes per row).
    """
    rows, packed = len(weight), []
    for rounded in round_spans(grid, block_size, weight, importance, moments, how):
        n = len(rounded.levels)
        blocks = [grid.pack_levels(*block).view(n, rows, -1) for block in rounded.blocks()]
        packed.append(torch.stack(blocks, 2))
    return torch.cat(packed).transpose(0, 1).reshape(rows, -1)


def round_spans(
    grid: Grid, block_size: int, weight: Tensor, importance: Tensor, moments: Moments, how: Thoroughness
) -> Iterator[Rounded]:
    """Yield the rounded spans of a weight, some at a time and in their order.

    Args:
        weight, importance: float32 (rows, input channels).
        moments: as for `round_for_outputs`.
    """
    rows, n = len(weight), len(moments.blocks)

    def by_channel(values: Tensor) -> Tensor:
        return values.view(rows, n, -1).permute(1, 2, 0).contiguous()

    weight, importance = by_channel(weight), by_channel(importance)
    # F^T e of the turns so far.
    left = weight.new_zeros(1, moments.factors.shape[2], rows)
    for turn in moments.turns:
        target = weight[turn.spans]
        if turn.spans.start:
            target = target + exact_product(turn.answer, left.expand(len(target), -1, -1))
        rounded = round_with_feedback(
            grid, block_size, target, importance[turn.spans], turn.moments, neighbors=how.neighbors
        )
        Descent(grid, target, turn.moments, rounded).run(how.sweeps)
        if turn.spans.stop < n:
            error = weight[turn.spans] - rounded.values(slice(0, rounded.scales.shape[1]))
            for part in exact_product(turn.factors, error):
                left = left + part
        yield rounded
