"""Coordinate descent: each weight, scale, min and factor in turn gets its best value, given all the others.

With e = weight - value, the error is e H e^T. The gradient e H, which is kept up to date, says how the error changes
with each value. Every step lowers the error, except for rounding factors to float16.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..search.levels import Integers, OddIntegers
from ..search.sub_blocks import reciprocal_or_zero
from .exact import exact_product, rounded_matrix, sum_channels
from .feedback import Option, Rounded, better
from .grid import Grid
from .moments import SpanMoments
from .small_matrices import root_and_inverse, times

# Relative determinant of the normal equations below which d and dmin are not told apart.
_SINGULAR = 1e-5


class Descent:
    """The descent from one rounding of a weight, which it changes in place.

    Args:
        weight: float32 (n, span, rows).
    """

    def __init__(self, grid: Grid, weight: Tensor, moments: SpanMoments, rounded: Rounded) -> None:
        self._grid, self._moments, self._rounded = grid, moments, rounded
        self._n_subs = rounded.scales.shape[1]
        error = weight - rounded.values(slice(0, self._n_subs))
        self._gradient = exact_product(moments.exact, error)
        # H summed over the channels of each sub-block, for its min: float64 (n, span, sub-blocks).
        shape = (*moments.matrix.shape[:2], self._n_subs, grid.size)
        self._of_mins = rounded_matrix(moments.matrix.view(shape).sum(3))

    def run(self, sweeps: int) -> None:
        """Fit the factors, then go over all sub-blocks and fit the factors again, `sweeps` times."""
        self._fit_factors()
        for _ in range(sweeps):
            for sub in range(self._n_subs):
                self._improve(sub)
            self._fit_factors()

    def _improve(self, sub: int) -> None:
        """Choose the levels of a sub-block, then its integer scale and min."""
        one = slice(sub, sub + 1)
        channels = slice(sub * self._grid.size, (sub + 1) * self._grid.size)
        before, matrix = self._rounded.values(one), self._moments.matrix[:, channels, channels].float()
        gradient = self._round(sub, channels, matrix)
        self._move(sub, self._rounded.levels[:, channels], gradient, matrix)
        change = self._rounded.values(one).sub_(before)
        self._gradient -= exact_product(self._moments.exact[:, :, channels], change)

    def _round(self, sub: int, channels: slice, matrix: Tensor) -> Tensor:
        """Round the groups of a sub-block one after the other; return its gradient, float32 (n, size, rows)."""
        levels, gradient = self._rounded.levels[:, channels], self._gradient[:, channels].clone()
        scale, together = self._rounded.effective(slice(sub, sub + 1))[0], self._grid.together
        round_group = self._grid.rounding(scale[:, 0], self._grid.offset(levels))
        for first in range(0, self._grid.size, together):
            group = slice(first, first + together)
            root, inverse = root_and_inverse(matrix[:, group, group])
            old = levels[:, group]
            # The values of least error if any were allowed.
            free = times(gradient[:, group], inverse).addcmul_(old, scale)
            new = round_group(free, root)
            if together > 1:
                new = _closer(new, old, free, scale, root)
            change = (new - old).mul_(scale)
            for i in range(together):
                gradient.addcmul_(matrix[:, :, first + i, None], change[:, i, None], value=-1)
            levels[:, group] = new
        return gradient

    def _move(self, sub: int, levels: Tensor, gradient: Tensor, matrix: Tensor) -> None:
        """Move the integer scale and min of a sub-block to the best neighbors.

        Args:
            levels, gradient: float32 (n, size, rows).
            matrix: float32 (n, size, size).
        """
        rounded, search, block = self._rounded, self._grid.search, sub // self._rounded.subs_per_block
        moves = list(itertools.product(_steps(search.scales), _steps(search.mins)))
        if len(moves) == 1:
            return
        product = exact_product(rounded_matrix(matrix), levels)
        of_levels, of_ones = sum_channels(levels * gradient), sum_channels(gradient)
        squares, mixed = sum_channels(levels * product), sum_channels(product)
        # Float32 sums could depend on threads.
        ones = matrix.double().sum((1, 2)).float()[:, None]
        scale, minimum = rounded.scales[:, sub], rounded.mins[:, sub]

        def option(scale_step: int, min_step: int) -> Option:
            new = search.scales.nearest(scale + scale_step), search.mins.nearest(minimum + min_step)
            a, b = rounded.d[:, block] * (new[0] - scale), rounded.dmin[:, block] * (new[1] - minimum)
            return a * (a * squares - 2 * of_levels) + b * (b * ones + 2 * of_ones - 2 * a * mixed), *new

        best, *others = (option(*move) for move in moves)
        for other in others:
            best = better(other, best)
        _, rounded.scales[:, sub], rounded.mins[:, sub] = best

    def _fit_factors(self) -> None:
        for block in range(self._rounded.d.shape[1]):
            self._fit_factors_of(block)

    def _fit_factors_of(self, block: int) -> None:
        """Fit d and dmin of a block by least squares."""
        rounded, per_block = self._rounded, self._rounded.subs_per_block
        subs = slice(block * per_block, (block + 1) * per_block)
        channels = slice(subs.start * self._grid.size, subs.stop * self._grid.size)
        mins = rounded.effective(subs)[1]
        parts = [rounded.values(subs).add_(mins.repeat_interleave(self._grid.size, 1))]
        products = [exact_product(self._moments.exact[:, :, channels], parts[0])]
        factors = [rounded.d[:, block]]
        if self._grid.search.mins.high > 0:
            parts.append(mins.repeat_interleave(self._grid.size, 1).neg_())
            products.append(exact_product(self._of_mins[:, :, subs], -mins))
            factors.append(rounded.dmin[:, block])
        changes = _least_squares(parts, [product[:, channels] for product in products], self._gradient[:, channels])
        for factor, change, product in zip(factors, changes, products, strict=True):
            new = self._grid.storable(factor * (1 + change))
            self._gradient -= product.mul_(((new - factor) * reciprocal_or_zero(factor))[:, None])
            factor.copy_(new)


def _least_squares(parts: Sequence[Tensor], products: Sequence[Tensor], gradient: Tensor) -> list[Tensor]:
    """Return by how much to enlarge one or two parts of a block for the least error, float32 (n, rows) each.

    Args:
        parts: float32 (n, channels, rows), which add up to the values.
        products: their products with H, float32 (n, channels, rows).
        gradient: float32 (n, channels, rows).
    """
    wanted = [sum_channels(part * gradient) for part in parts]
    squares = [sum_channels(part * product) for part, product in zip(parts, products, strict=True)]
    alone = wanted[0] * reciprocal_or_zero(squares[0])
    if len(parts) == 1:
        return [alone]
    mixed = sum_channels(parts[0] * products[1])
    determinant = squares[0] * squares[1] - mixed * mixed
    solved, inverse = determinant > _SINGULAR * squares[0] * squares[1], reciprocal_or_zero(determinant)
    both = (wanted[0] * squares[1] - wanted[1] * mixed), (wanted[1] * squares[0] - wanted[0] * mixed)
    return [torch.where(solved, both[0] * inverse, alone), torch.where(solved, both[1] * inverse, 0.0)]


def _closer(new: Tensor, old: Tensor, values: Tensor, scale: Tensor, root: Tensor) -> Tensor:
    """Return the new levels of a group where they have less error than the old ones: a grid's are not always the best.

    Args:
        new, old, values: float32 (n, k, rows).
        scale: float32 (n, 1, rows).
        root: float32 (n, k, k), from `root_and_inverse`.
    """
    costs = [sum_channels(times(values - scale * levels, root).square_()) for levels in (new, old)]
    return torch.where((costs[0] < costs[1])[:, None], new, old)


def _steps(integers: Integers | OddIntegers) -> tuple[int, ...]:
    return (0,) if integers.low == integers.high else (0, -integers.step, integers.step)
