"""Scales as a block stores them: float16 d and dmin, integer scales and mins, fitted to each other and to the codes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .levels import Integers, Levels
from .scale import solve
from .sub_blocks import SubBlocks, pairwise_sum, reciprocal_or_zero, round_to_float16, select_best

# `refine` takes sub-blocks whose mean has at least this share of their energy (the sum of squares): all weights lie
# far from 0, at 3 standard deviations or more.
_MEAN_SHARE = 0.9
# It also takes sub-blocks whose largest weight has at least this share of their energy.
_LARGEST_SHARE = 0.9
# At least this share of the weights must not be 0.
_NONZERO_SHARE = 0.75
# How far `refine` moves an integer scale in the first round.
_REFINE_REACH = 8


@dataclass(frozen=True)
class BlockScales:
    """The scales and mins of n blocks of k sub-blocks, which approximate x ~ (d * scales) * q - dmin * mins.

    Args:
        d, dmin: float16 values as float32, (n,).
        scales, mins: integers as float32, (n, k).
    """

    d: Tensor
    dmin: Tensor
    scales: Tensor
    mins: Tensor

    def select(self, indices: Tensor) -> BlockScales:
        """Return those of the blocks with these numbers, int64 (m,)."""
        return BlockScales(*(field[indices] for field in self.fields()))

    def fields(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return d and dmin, float32 (n,), and scales and mins, float32 (n, k)."""
        return self.d, self.dmin, self.scales, self.mins

    def effective(self) -> tuple[Tensor, Tensor]:
        """Return the effective scale, d * scale, and min, dmin * min, of each sub-block, float32 (n * k,)."""
        return (self.d[:, None] * self.scales).view(-1), (self.dmin[:, None] * self.mins).view(-1)

    def round(self, sub_blocks: SubBlocks, levels: Levels) -> tuple[Tensor, Tensor]:
        """Round the weights of n * k sub-blocks to levels.

        Returns:
            The level nearest to each weight, float32 (size, n * k), and the weighted squared error of each sub-block,
            float32 (n, k).
        """
        scale, minimum = self.effective()
        shifted = sub_blocks.x + minimum
        q = levels.nearest(shifted * reciprocal_or_zero(scale))
        error = sub_blocks.weighted_sum(shifted.addcmul_(q, scale, value=-1).square_())
        return q, error.view_as(self.scales)

    def residual(self, sub_blocks: SubBlocks, q: Tensor) -> Tensor:
        """Return the weights minus what the levels q stand for; q and the result are float32 (size, n * k)."""
        scale, minimum = self.effective()
        return (sub_blocks.x + minimum).addcmul_(q, scale, value=-1)


@dataclass(frozen=True)
class SearchSettings:
    """Which integers a block can store, and how many combinations of them are tried.

    Args:
        scales, mins: the ranges of the integer scales and mins. They hold one integer for a type that stores none.
        starts: integers for the largest scale and min of a block. Each gives d and dmin; the best after one round wins.
        rounds: how often the neighbors of all scales and mins are tried. d and dmin are fitted before all but the
            first round.
        reach: how far a scale may move in the first round; in later rounds it moves by one.
    """

    scales: Integers
    mins: Integers
    starts: Sequence[int]
    rounds: int
    reach: int = 1

    @property
    def scale_precision(self) -> float:
        """The largest relative error that storing a scale causes: as an integer, or as a float16 if there is none."""
        return 0.5 / self.scales.high if self.scales.high > 1 else 2.0**-10

    def steps(self, number: int) -> Iterator[tuple[int, int]]:
        """Return the changes of (scale, min) that a round tries; the first of them changes nothing."""
        return itertools.product(_steps(self.scales, 1 if number else self.reach), _steps(self.mins, 1))


def fit_scales(
    sub_blocks: SubBlocks, levels: Levels, scale: Tensor, minimum: Tensor, settings: SearchSettings
) -> tuple[BlockScales, Tensor]:
    """Turn real-valued scales and mins into stored ones with a small squared error.

    Each round chooses integer scales, integer mins and codes for fixed d and dmin. Before the next round, d and dmin
    are fitted to these by least squares. Each step lowers the error, except for rounding d and dmin to float16, so the
    best round is kept.

    Args:
        scale, minimum: the real-valued scale and min of each sub-block, float32 (n, k).

    Returns:
        The scales of n blocks and their weighted squared errors, float32 (n,).

    Source: the alternation of S. Lloyd, Least squares quantization in PCM (1982), applied to ggml's block formats.
    """
    return _best(_run_rounds(sub_blocks, levels, scale, minimum, settings))


def refine(
    sub_blocks: SubBlocks,
    levels: Levels,
    found: tuple[BlockScales, Tensor],
    starts: Callable[[SubBlocks], Sequence[tuple[Tensor, Tensor]]],
    settings: SearchSettings,
) -> BlockScales:
    """Try more scales and mins for blocks that are nearly constant, have few values, or one large weight among small.

    Many real-valued scales suit such a block equally well. Which of them is best after rounding can only be tried.

    Args:
        found: the result of `fit_scales`; its scales are changed in place where better ones are found.
        starts: returns pairs of real-valued scales and mins, float32 (m * k,), for the sub-blocks of m such blocks.
    """
    blocks, error = found
    shape = blocks.scales.shape
    hard = torch.nonzero((error > 0) & _is_hard(sub_blocks, error, shape, settings))[:, 0]
    if not len(hard):
        return blocks
    part, settings = sub_blocks.select_blocks(hard, shape[1]), replace(settings, reach=_REFINE_REACH)
    views = [[values.view(-1, shape[1]) for values in start] for start in starts(part)]
    tried = [fit_scales(part, levels, scale, minimum, settings) for scale, minimum in views]
    better = _best([(blocks.select(hard), error[hard]), *tried])[0]
    for old, new in zip(blocks.fields(), better.fields(), strict=True):
        old[hard] = new
    return blocks


def _is_hard(sub_blocks: SubBlocks, error: Tensor, shape: torch.Size, settings: SearchSettings) -> Tensor:
    """Return which blocks `refine` takes, bool (n,), for n blocks of k sub-blocks, `shape` (n, k).

    One kind are blocks whose error is no larger than what storing a scale causes. The other kind have a sub-block whose
    energy is nearly all in its mean or in its largest weight. Blocks with many zeros are left out: the weights that
    remain have scales to choose from.
    """
    x, size = sub_blocks.x, len(sub_blocks.x)
    weighted_energy = pairwise_sum(sub_blocks.weighted_sum(x * x).view(shape).t())
    energy, largest = pairwise_sum(x * x), sub_blocks.signed_amax().square_()
    n_nonzero = pairwise_sum((x != 0).float())
    is_uneven = (pairwise_sum(x).square_() > _MEAN_SHARE * size * energy) | (largest > _LARGEST_SHARE * energy)
    is_uneven &= n_nonzero > _NONZERO_SHARE * size
    is_exact = error < settings.scale_precision**2 * weighted_energy
    is_exact &= pairwise_sum(n_nonzero.view(shape).t()) > _NONZERO_SHARE * size * shape[1]
    return is_exact | is_uneven.view(shape).any(1)


def _best(found: Iterable[tuple[BlockScales, Tensor]]) -> tuple[BlockScales, Tensor]:
    """Return for each block the scales of least error, and that error, float32 (n,)."""
    blocks, errors = zip(*found, strict=True)
    *best, error = select_best(errors, *zip(*(each.fields() for each in blocks), strict=True), errors)
    return BlockScales(*best), error


def _run_rounds(
    sub_blocks: SubBlocks, levels: Levels, scale: Tensor, minimum: Tensor, settings: SearchSettings
) -> Iterator[tuple[BlockScales, Tensor]]:
    """Yield the scales after each round and the squared error of each block, float32 (n,)."""
    begun = (_start(scale, minimum, settings, largest) for largest in settings.starts)
    blocks, error = _best(_try_neighbors(sub_blocks, levels, blocks, settings, 0) for blocks in begun)
    yield blocks, error
    for number in range(1, settings.rounds):
        blocks, error = _try_neighbors(sub_blocks, levels, _refit(sub_blocks, levels, blocks), settings, number)
        yield blocks, error


def _start(scale: Tensor, minimum: Tensor, settings: SearchSettings, largest: int) -> BlockScales:
    """Choose d and dmin so that the largest scale and min of each block become the integer `largest`."""
    d, dmin = round_to_float16(_signed_amax(scale) / largest), round_to_float16(_signed_amax(minimum) / largest)
    scales = settings.scales.nearest(scale * reciprocal_or_zero(d)[:, None])
    return BlockScales(d, dmin, scales, settings.mins.nearest(minimum * reciprocal_or_zero(dmin)[:, None]))


def _try_neighbors(
    sub_blocks: SubBlocks, levels: Levels, blocks: BlockScales, settings: SearchSettings, number: int
) -> tuple[BlockScales, Tensor]:
    """Move the integer scale and min of each sub-block to the best neighbors; also return the error of each block."""
    errors, moved_scales, moved_mins = [], [], []
    for scale_step, min_step in settings.steps(number):
        moved_scales.append(settings.scales.nearest(blocks.scales + scale_step))
        moved_mins.append(settings.mins.nearest(blocks.mins + min_step))
        moved = BlockScales(blocks.d, blocks.dmin, moved_scales[-1], moved_mins[-1])
        errors.append(moved.round(sub_blocks, levels)[1].view(-1))
    best = select_best(errors, errors, [s.view(-1) for s in moved_scales], [m.view(-1) for m in moved_mins])
    error, scale, minimum = (values.view_as(blocks.scales) for values in best)
    return BlockScales(blocks.d, blocks.dmin, scale, minimum), pairwise_sum(error.t())


def _refit(sub_blocks: SubBlocks, levels: Levels, blocks: BlockScales) -> BlockScales:
    """Fit d and dmin of each block by least squares to its codes, integer scales and integer mins."""
    q, _ = blocks.round(sub_blocks, levels)
    scale, minimum, shape = blocks.scales, blocks.mins, blocks.scales.shape
    # Least squares for the residual gives corrections of d and dmin. Sums of the weights themselves would lose these.
    residual = SubBlocks(blocks.residual(sub_blocks, q), sub_blocks.w)
    xq, qq = (values.view(shape) for values in residual.weighted_products(q))
    sums = residual.total_importance(), residual.weighted_sum(residual.x), residual.weighted_sum(q)
    sw, sx, sq = (values.view(shape) for values in sums)
    terms = (minimum * minimum * sw, minimum * sx, scale * minimum * sq, scale * xq, scale * scale * qq)
    d, dmin = solve(*(pairwise_sum(term.t()) for term in terms))
    return BlockScales(round_to_float16(blocks.d + d), round_to_float16(blocks.dmin + dmin), scale, minimum)


def _steps(integers: Integers, reach: int) -> list[int]:
    return [0] if integers.low == integers.high else sorted(range(-reach, reach + 1), key=abs)


def _signed_amax(values: Tensor) -> Tensor:
    """Return the value of largest magnitude in each row with its sign, (n, k) -> (n,)."""
    return values.gather(1, values.abs().argmax(1, keepdim=True))[:, 0]
