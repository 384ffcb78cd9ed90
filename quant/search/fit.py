"""Blocks as they are stored: float16 d and dmin, small integer scales and mins, codes, all fitted to each other."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .columns import Columns, float16, inverse, least, total
from .levels import Integers, Levels
from .scale import solve


@dataclass(frozen=True)
class Blocks:
    """x ~ (d * scales) * q - dmin * mins, for n blocks of k sub-blocks, all float32.

    `d` and `dmin` are (n,), float16 values; `scales` and `mins` are (n, k), integers.
    """

    d: Tensor
    dmin: Tensor
    scales: Tensor
    mins: Tensor

    def part(self, chosen: Tensor) -> Blocks:
        """The blocks of these indices."""
        return Blocks(*(field[chosen] for field in self.fields()))

    def fields(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.d, self.dmin, self.scales, self.mins

    def nearest(self, columns: Columns, levels: Levels) -> tuple[Tensor, Tensor]:
        """The levels nearest to the weights, (size, n * k), and the squared error of each sub-block, (n, k)."""
        scale, minimum = (self.d[:, None] * self.scales).view(-1), (self.dmin[:, None] * self.mins).view(-1)
        raised = columns.x + minimum
        q = levels.nearest(raised * inverse(scale))
        error = columns.sum(raised.addcmul_(q, scale, value=-1).square_())
        return q, error.view_as(self.scales)


@dataclass(frozen=True)
class Search:
    """Which integers a block may hold, and how far to look for the best.

    Args:
        scales, mins: the ranges of the sub-block scales and mins; of one integer for a type that stores none.
        starts: integers for the largest scale and min of a block to begin with; each is followed on its own.
        rounds: how often the neighbours of all scales and mins are tried, with new d and dmin from the second time on.
    """

    scales: Integers
    mins: Integers
    starts: Sequence[int]
    rounds: int

    @property
    def rounding(self) -> float:
        """What rounding the scales alone may cost: the relative error to which integers, or a float16, hold one."""
        return 0.5 / self.scales.high if self.scales.high > 1 else 2.0**-10

    def steps(self) -> Iterator[tuple[int, int]]:
        """Changes of (scale, min) to try, none at all first."""
        scale_steps, min_steps = ((0,) if r.low == r.high else (0, -1, 1) for r in (self.scales, self.mins))
        return itertools.product(scale_steps, min_steps)


def fit(columns: Columns, levels: Levels, scale: Tensor, minimum: Tensor, search: Search) -> tuple[Blocks, Tensor]:
    """The best blocks found from real scales and mins of their sub-blocks, (n, k), and their squared errors, (n,).

    Scales, mins and codes are chosen for given d and dmin, then d and dmin by least squares for all of these, in turn.
    Each turn lowers the error, but for the rounding of d and dmin to float16; the best turn counts.

    Source: the alternation of S. Lloyd, Least squares quantization in PCM (1982), over ggml's block formats.
    """
    return _best(_turns(columns, levels, scale, minimum, search))


def refine(
    columns: Columns,
    levels: Levels,
    found: tuple[Blocks, Tensor],
    starts: Sequence[tuple[Tensor, Tensor]],
    search: Search,
) -> Blocks:
    """Tries other scales and mins, (n, k), for blocks whose error is that of rounded scales: constants, a few values.

    Many scales suit them alike in real numbers. Which one is best once it is rounded, only trying tells.
    """
    blocks, error = found
    signal = total(columns.sum(columns.x * columns.x).view_as(blocks.scales).t())
    chosen = torch.nonzero((error > 0) & (error < search.rounding**2 * signal))[:, 0]
    if not len(chosen):
        return blocks
    part = columns.of_blocks(chosen, blocks.scales.shape[1])
    tried = [fit(part, levels, scale[chosen], minimum[chosen], search) for scale, minimum in starts]
    better = _best([(blocks.part(chosen), error[chosen]), *tried])[0]
    for old, new in zip(blocks.fields(), better.fields(), strict=True):
        old[chosen] = new
    return blocks


def _best(found: Iterable[tuple[Blocks, Tensor]]) -> tuple[Blocks, Tensor]:
    blocks, errors = zip(*found, strict=True)
    *best, error = least(errors, *zip(*(each.fields() for each in blocks), strict=True), errors)
    return Blocks(*best), error


def _turns(
    columns: Columns, levels: Levels, scale: Tensor, minimum: Tensor, search: Search
) -> Iterator[tuple[Blocks, Tensor]]:
    """All blocks that are met, with the squared error of each block, (n,)."""
    for start in search.starts:
        blocks = _begin(scale, minimum, search, start)
        for turn in range(search.rounds):
            if turn:
                blocks = _refit(columns, levels, blocks)
            blocks, error = _step(columns, levels, blocks, search)
            yield blocks, error


def _begin(scale: Tensor, minimum: Tensor, search: Search, start: int) -> Blocks:
    d, dmin = float16(_largest(scale) / start), float16(_largest(minimum) / start)
    scales = search.scales.nearest(scale * inverse(d)[:, None])
    return Blocks(d, dmin, scales, search.mins.nearest(minimum * inverse(dmin)[:, None]))


def _step(columns: Columns, levels: Levels, blocks: Blocks, search: Search) -> tuple[Blocks, Tensor]:
    """Take the best step in every sub-block. Also the squared error of each block, (n,)."""
    errors, scales, mins = [], [], []
    for scale_step, min_step in search.steps():
        scales.append(search.scales.nearest(blocks.scales + scale_step))
        mins.append(search.mins.nearest(blocks.mins + min_step))
        moved = Blocks(blocks.d, blocks.dmin, scales[-1], mins[-1])
        errors.append(moved.nearest(columns, levels)[1].view(-1))
    best = least(errors, errors, [s.view(-1) for s in scales], [m.view(-1) for m in mins])
    error, scale, minimum = (values.view_as(blocks.scales) for values in best)
    return Blocks(blocks.d, blocks.dmin, scale, minimum), total(error.t())


def _refit(columns: Columns, levels: Levels, blocks: Blocks) -> Blocks:
    """d and dmin by least squares for the codes, scales and mins of each block."""
    q, _ = blocks.nearest(columns, levels)
    scale, minimum, shape = blocks.scales, blocks.mins, blocks.scales.shape
    xq, qq = (values.view(shape) for values in columns.products(q))
    sw, sx, sq = (values.view(shape) for values in (columns.weight(), columns.sum(columns.x), columns.sum(q)))
    terms = (minimum * minimum * sw, minimum * sx, scale * minimum * sq, scale * xq, scale * scale * qq)
    d, dmin = solve(*(total(term.t()) for term in terms), signed=True)
    return Blocks(float16(d), float16(dmin), scale, minimum)


def _largest(values: Tensor) -> Tensor:
    """Of each row the value of largest magnitude, with its sign."""
    return values.gather(1, values.abs().argmax(1, keepdim=True))[:, 0]
