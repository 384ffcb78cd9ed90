"""A table of W4A8's values that is fitted to a weight, for weights whose tails are heavy even after the rotation.

Kitchen decides by the same measure of the tails, and fits a table to a sample of the weight. Here, a histogram of the
whole weight takes the place of the sample, in whole numbers, so that the table does not depend on the order of sums.

Source: comfy_kitchen 0.2.40 backends/eager/w4a8_int8.py _codebook_for; S. Lloyd, Least squares quantization in PCM
(1982).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .code_values import BINS

# The excess kurtosis of magnitudes relative to the largest of their group, above which kitchen fits a table. It looks
# at a sample, so that this is a little less.
_HEAVY = -0.15
# Of the interval from -1 to 1.
_BINS = 1 << 14
SAMPLE = 1 << 20
"""Weights that tell the tails, and to which a table is fitted."""
_MOST = 1 << 20
_LEVELS = 16
_ITERATIONS = 50
# Neighbors lie at least so far apart, as `code_values` demands.
_LEAST_DISTANCE = 3 * 2 / BINS


def histograms(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Count weights by their size relative to the largest of their group.

    Args:
        groups: float32 (group, groups).

    Returns:
        int64 (bins,): of all weights alike, and of each as much as the square of the largest of its group.
    """
    largest = groups.abs().amax(0)
    relative = groups / torch.where(largest > 0, largest, 1)
    bins = ((relative + 1) * (_BINS // 2)).clamp_(0, _BINS - 1).long().flatten().cpu()
    share = largest.cpu().double() / largest.amax().cpu().double().clamp(min=1e-300)
    # Whole numbers: a float64 adds them without rounding errors.
    sizes = (share.square() * _MOST).round_().expand(len(groups), -1).flatten()
    return torch.bincount(bins, minlength=_BINS), torch.bincount(bins, sizes, minlength=_BINS).long()


def has_heavy_tails(counts: Tensor) -> bool:
    """Return whether a weight with this histogram, int64 (bins,), gets a table of its own."""
    centers = _centers()
    centers = centers - (centers * counts).sum() / counts.sum()
    variance = (centers.square() * counts).sum() / counts.sum()
    kurtosis = (centers.pow(4) * counts).sum() / counts.sum() / variance.square().clamp(min=1e-30) - 3
    return bool(kurtosis > _HEAVY)


def fitted_table(counts: Tensor) -> tuple[float, ...]:
    """Return the values of least squared error for a weight with this histogram, int64 (bins,)."""
    index = torch.arange(_BINS)
    # Whole numbers up to each bin: how many weights there are, and the sum of their bins.
    total, weighted = counts.cumsum(0), (counts * index).cumsum(0)
    ends = (
        torch.cat([torch.zeros(1, dtype=torch.int64), total]),
        torch.cat([torch.zeros(1, dtype=torch.int64), weighted]),
    )
    shares = torch.linspace(0, 1, _LEVELS, dtype=torch.float64) * (int(total[-1]) - 1)
    levels = torch.searchsorted(total, shares.long() + 1).double()
    for _ in range(_ITERATIONS):
        middles = ((levels[1:] + levels[:-1]) / 2).ceil().long().clamp(0, _BINS)
        edges = torch.cat([torch.zeros(1, dtype=torch.int64), middles, torch.tensor([_BINS])])
        many, sums = (each[edges[1:]] - each[edges[:-1]] for each in ends)
        levels = torch.where(many > 0, sums.double() / many.clamp(min=1), levels)
    return _apart(((levels + 0.5) / (_BINS // 2) - 1).tolist())


def _apart(values: list[float]) -> tuple[float, ...]:
    """Return rising values with the least distance between neighbors."""
    apart = [values[0]]
    for value in values[1:]:
        apart.append(max(value, apart[-1] + _LEAST_DISTANCE))
    over = max(apart[-1] - 1, 0.0)
    return tuple(torch.tensor(apart, dtype=torch.float64).sub(over).float().tolist())


def _centers() -> Tensor:
    return (torch.arange(_BINS, dtype=torch.float64) + 0.5) / (_BINS // 2) - 1
