"""What a search for the scales of grid encoders tries, and the candidates that it reads errors off.

A search by exhaustion takes long, so it is done for a few scales only. It leaves candidates: entries that are best for
one of these scales in a part of the grid. What all other scales would give is then read off the candidates. With sums
a of w * c**2 and b of w * x * c, the error of a candidate c under a scale s is s**2 * a - 2 * s * b plus a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .levels import Integers, OddIntegers
from .sub_blocks import SubBlocks, pairwise_sum, round_to_float16, select_best

_ZERO = Integers(0, 0)


@dataclass(frozen=True)
class TriedScales:
    """The scales that a search tries, relative to what the weights of a sub-block suggest.

    Args:
        of_candidates: the scales that candidates are searched for with, by exhaustion.
        tried: the scales from which the real-valued one is chosen.
        of_d: values of d, where 1 makes the largest scale of a block its largest integer.
        of_refined_d: values of d relative to the best of these, tried with candidates for the best scales; none where
            these gain little.
    """

    of_candidates: Sequence[float]
    tried: Sequence[float]
    of_d: Sequence[float]
    of_refined_d: Sequence[float]


def _geometric(low: float, high: float, count: int) -> list[float]:
    return [low * (high / low) ** (index / (count - 1)) for index in range(count)]


_TRIED, _OF_D = _geometric(0.45, 1.8, 9), (1.0, 1.08, 1.2)
FOUR_AT_ONCE = TriedScales((0.77, 1.0, 1.32), _TRIED, _OF_D, (1.0, 0.98, 1.02))
EIGHT_AT_ONCE = TriedScales((0.85, 1.2), _TRIED, _OF_D, ())
HARD = TriedScales(
    _geometric(0.3, 18.0, 12), _geometric(0.3, 18.0, 48), (1.0, 1.08, 1.2, 1.6, 3.0, 9.0), (1.0, 0.99, 1.01)
)


@dataclass(frozen=True)
class GridSearch:
    """The integers of a type, and where the search for its scales begins.

    Args:
        scales: the range of the integer scales.
        tried: the scales that the search tries for most blocks.
        anchor: the level that the root of sum w * x**4 / sum w * x**2 is usually mapped to.
    """

    scales: OddIntegers
    tried: TriedScales
    anchor: float
    mins: Integers = _ZERO


@dataclass(frozen=True)
class Candidates:
    """Candidates for the entries of each group in n sub-blocks, by the sums that their errors consist of.

    Both sums have the axes (offsets, exhaustive searches, candidates, entries of a group, groups of a sub-block, n).

    Args:
        squares: the sums of w * c**2, float32.
        products: the sums of -2 * w * x * c, float32.
    """

    squares: Tensor
    products: Tensor

    def joined(self, other: Candidates) -> Candidates:
        """Return these candidates and those of other searches."""
        pairs = ((self.squares, other.squares), (self.products, other.products))
        return Candidates(*(torch.cat(pair, 1) for pair in pairs))

    def error(self, scale: Tensor) -> Tensor:
        """Return the weighted squared error under scales, float32 (n,), without the constant sum w * x**2."""
        error = torch.addcmul(self.products, self.squares, scale).amin(2)
        of_groups = pairwise_sum(error.movedim(2, 0)).amin(1)
        return pairwise_sum(of_groups.transpose(0, 1)).amin(0) * scale


def fit_constants(values: Tensor, levels: Tensor, high: int, unit: float) -> tuple[Tensor, Tensor]:
    """Fit d and one scale to blocks whose weights all have one value.

    Args:
        values: float32 (n,), at least 0.
        levels: the levels that all weights of a block can have alike, float32 (levels,).
        high: the largest scale; scales are odd.
        unit: what d is a float16 multiple of.

    Returns:
        d, float32 (n,), and the scale, float32 (n, 1), of least error.
    """
    scales = torch.arange(1, high + 1, 2, device=values.device)
    factors = (levels[levels > 0, None] * scales).flatten() * unit
    d = round_to_float16(values[:, None] * factors.reciprocal())
    best = (values[:, None] - d * factors).abs().argmin(1, keepdim=True)
    scale = scales.repeat(len(factors) // len(scales))[best]
    return d.gather(1, best)[:, 0] * unit, scale.float()


def best_of(options: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each block the option of least error: d, (n,), scales, (n, k), and errors, (n,), all float32."""
    d, scales, errors = zip(*options, strict=True)
    best = select_best(errors, d, scales, errors)
    return best[0], best[1], best[2]


def weighted_sums(x: Tensor, w: Tensor | None, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of w * c**2 and of w * x * c for each candidate c.

    Args:
        x, w: float32 (dim, n).
        levels: float32 (dim, candidates, n).

    Returns:
        Both float32 (candidates, n).
    """
    weighted = levels if w is None else levels * w[:, None]
    return pairwise_sum(weighted * levels), pairwise_sum(weighted * x[:, None])


def weighted_error(x: Tensor, scale: Tensor, w: Tensor | None, levels: Tensor) -> Tensor:
    """Return the sum of w * (x - scale * levels)**2 over the rows, all float32 (rows, n): float32 (n,)."""
    return SubBlocks(x, w).weighted_sum((x - levels * scale).square_())
