"""Blocks as they are stored: float16 d and dmin, small integer scales and mins, codes, all fitted to each other."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .columns import Columns, float16, inverse, least, total
from .levels import Integers, Levels
from .scale import solve

# Of the squared weights of a sub-block the part that its mean takes where all lie far from 0, at 3 sigma, and the part
# that the largest takes where it stands alone.
_FAR, _PEAKED = 0.9, 0.9
# Of the weights of a sub-block, or a block, the part that is not 0 at least.
_FILLED = 0.75
# How far the scales of such blocks are tried.
_REACH = 8


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
        scale, minimum = self.lines()
        raised = columns.x + minimum
        q = levels.nearest(raised * inverse(scale))
        error = columns.sum(raised.addcmul_(q, scale, value=-1).square_())
        return q, error.view_as(self.scales)

    def rest(self, columns: Columns, q: Tensor) -> Tensor:
        """What the levels q leave of the weights, (size, n * k)."""
        scale, minimum = self.lines()
        return (columns.x + minimum).addcmul_(q, scale, value=-1)

    def lines(self) -> tuple[Tensor, Tensor]:
        """The scale and the minimum of each sub-block, (n * k,)."""
        return (self.d[:, None] * self.scales).view(-1), (self.dmin[:, None] * self.mins).view(-1)


@dataclass(frozen=True)
class Search:
    """Which integers a block may hold, and how far to look for the best.

    Args:
        scales, mins: the ranges of the sub-block scales and mins; of one integer for a type that stores none.
        starts: integers for the largest scale and min of a block to begin with; the best after one round counts.
        rounds: how often the neighbours of all scales and mins are tried, with new d and dmin from the second time on.
        reach: how far a scale may move the first time; later all move by one.
    """

    scales: Integers
    mins: Integers
    starts: Sequence[int]
    rounds: int
    reach: int = 1

    @property
    def rounding(self) -> float:
        """What rounding the scales alone may cost: the relative error to which integers, or a float16, hold one."""
        return 0.5 / self.scales.high if self.scales.high > 1 else 2.0**-10

    def steps(self, turn: int) -> Iterator[tuple[int, int]]:
        """Changes of (scale, min) to try, none at all first."""
        return itertools.product(_steps(self.scales, 1 if turn else self.reach), _steps(self.mins, 1))


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
    starts: Callable[[Columns], Sequence[tuple[Tensor, Tensor]]],
    search: Search,
) -> Blocks:
    """Tries more scales and mins for blocks whose weights are nearly constant, few values or one large among small.

    Many scales suit them alike in real numbers. Which one is best once it is rounded, only trying all of them tells.

    Args:
        starts: scales and mins, (n * k,), to begin with, from the columns of such blocks.
    """
    blocks, error = found
    shape = blocks.scales.shape
    chosen = torch.nonzero((error > 0) & _is_hard(columns, error, shape, search))[:, 0]
    if not len(chosen):
        return blocks
    part, search = columns.of_blocks(chosen, shape[1]), replace(search, reach=_REACH)
    views = [[values.view(-1, shape[1]) for values in start] for start in starts(part)]
    tried = [fit(part, levels, scale, minimum, search) for scale, minimum in views]
    better = _best([(blocks.part(chosen), error[chosen]), *tried])[0]
    for old, new in zip(blocks.fields(), better.fields(), strict=True):
        old[chosen] = new
    return blocks


def _is_hard(columns: Columns, error: Tensor, shape: torch.Size, search: Search) -> Tensor:
    """Whether the error is that of rounded scales, or weights lie far from 0 or, but for one, near it; (n,) bool.

    Not where many weights are 0: what is left has scales to choose from.
    """
    x, size = columns.x, len(columns.x)
    signal = total(columns.sum(x * x).view(shape).t())
    energy, extreme = total(x * x), columns.extreme().square_()
    filled = total((x != 0).float())
    alike = (total(x).square_() > _FAR * size * energy) | (extreme > _PEAKED * energy)
    alike &= filled > _FILLED * size
    rounded = error < search.rounding**2 * signal
    return rounded & (total(filled.view(shape).t()) > _FILLED * len(x) * shape[1]) | alike.view(shape).any(1)


def _best(found: Iterable[tuple[Blocks, Tensor]]) -> tuple[Blocks, Tensor]:
    blocks, errors = zip(*found, strict=True)
    *best, error = least(errors, *zip(*(each.fields() for each in blocks), strict=True), errors)
    return Blocks(*best), error


def _turns(
    columns: Columns, levels: Levels, scale: Tensor, minimum: Tensor, search: Search
) -> Iterator[tuple[Blocks, Tensor]]:
    """What the best start of each block becomes from turn to turn, with the squared error of each block, (n,)."""
    begun = (_begin(scale, minimum, search, start) for start in search.starts)
    blocks, error = _best(_step(columns, levels, blocks, search, 0) for blocks in begun)
    yield blocks, error
    for turn in range(1, search.rounds):
        blocks, error = _step(columns, levels, _refit(columns, levels, blocks), search, turn)
        yield blocks, error


def _begin(scale: Tensor, minimum: Tensor, search: Search, start: int) -> Blocks:
    d, dmin = float16(_largest(scale) / start), float16(_largest(minimum) / start)
    scales = search.scales.nearest(scale * inverse(d)[:, None])
    return Blocks(d, dmin, scales, search.mins.nearest(minimum * inverse(dmin)[:, None]))


def _step(columns: Columns, levels: Levels, blocks: Blocks, search: Search, turn: int) -> tuple[Blocks, Tensor]:
    """Take the best step in every sub-block. Also the squared error of each block, (n,)."""
    errors, scales, mins = [], [], []
    for scale_step, min_step in search.steps(turn):
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
    # What d and dmin leave over is what they are corrected by: sums of the weights themselves would lose it.
    rest = Columns(blocks.rest(columns, q), columns.w)
    xq, qq = (values.view(shape) for values in rest.products(q))
    sw, sx, sq = (values.view(shape) for values in (rest.weight(), rest.sum(rest.x), rest.sum(q)))
    terms = (minimum * minimum * sw, minimum * sx, scale * minimum * sq, scale * xq, scale * scale * qq)
    d, dmin = solve(*(total(term.t()) for term in terms))
    return Blocks(float16(blocks.d + d), float16(blocks.dmin + dmin), scale, minimum)


def _steps(integers: Integers, reach: int) -> list[int]:
    return [0] if integers.low == integers.high else sorted(range(-reach, reach + 1), key=abs)


def _largest(values: Tensor) -> Tensor:
    """Of each row the value of largest magnitude, with its sign."""
    return values.gather(1, values.abs().argmax(1, keepdim=True))[:, 0]
