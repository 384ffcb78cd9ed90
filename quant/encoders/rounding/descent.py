"""Coordinate descent: each weight, scale, min and factor in turn gets its best value, given all the others.

With e = weight - value, the error is e H e^T. The gradient e H, which is kept up to date, says how the error changes
with each value. Every step lowers the error, except for rounding factors to float16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..search.sub_blocks import reciprocal_or_zero
from .exact import exact_product, rounded_matrix, sum_channels
from .feedback import Option, Rounded, better
from .grid import Grid, Scales
from .moments import SpanMoments
from .small_matrices import diagonal_blocks, root_and_inverse, times

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
        if self._grid.has_factors:
            self._fit_factors()
        for _ in range(sweeps):
            for sub in range(self._n_subs):
                self._improve(sub)
            if self._grid.has_factors:
                self._fit_factors()

    def _improve(self, sub: int) -> None:
        """Choose the levels of a sub-block, then its scale and min."""
        one = slice(sub, sub + 1)
        channels = slice(sub * self._grid.size, (sub + 1) * self._grid.size)
        before, matrix = self._rounded.values(one), self._moments.matrix[:, channels, channels].float()
        scale, levels = self._rounded.effective(one)[0], self._rounded.levels[:, channels]
        if self._grid.has_factors:
            new, gradient = self._round(levels, scale, self._gradient[:, channels], matrix)
            self._move(sub, new, gradient, matrix)
        else:
            new, self._rounded.scales[:, sub] = self._round_again(levels, scale, self._gradient[:, channels], matrix)
        self._rounded.levels[:, channels] = new
        change = self._rounded.values(one).sub_(before)
        self._gradient -= exact_product(self._moments.exact[:, :, channels], change)

    def _round(
        self, old: Tensor, scale: Tensor, gradient: Tensor, matrix: Tensor, unit_of_old: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Round the groups of a sub-block one after the other.

        Args:
            old, gradient: float32 (n, size, rows).
            scale: float32 (n, 1, rows).
            matrix: float32 (n, size, size).
            unit_of_old: what the old levels count, float32 (n, 1, rows), if not as much as the new ones.

        Returns:
            The levels and the gradient after it, float32 (n, size, rows).
        """
        gradient, levels, together = gradient.clone(), old.clone(), self._grid.together
        round_group, unit = self._grid.rounding(scale[:, 0], self._grid.offset(old)), self._grid.unit(scale)
        roots, inverses = (values.unbind(1) for values in root_and_inverse(diagonal_blocks(matrix, together)))
        for first, root, inverse in zip(range(0, self._grid.size, together), roots, inverses, strict=True):
            group = slice(first, first + together)
            # The values of least error if any were allowed.
            free = times(gradient[:, group], inverse)
            free = free.addcmul_(old[:, group], unit if unit_of_old is None else unit_of_old)
            new = round_group(free, root)
            if together > 1:
                new = _closer(new, old[:, group], free, scale, root)
            if unit_of_old is None:
                change = (new - old[:, group]).mul_(unit)
            else:
                change = new * unit - old[:, group] * unit_of_old
            for i in range(together):
                gradient.addcmul_(matrix[:, :, first + i, None], change[:, i, None], value=-1)
            levels[:, group] = new
        return levels, gradient

    def _round_again(self, old: Tensor, scale: Tensor, gradient: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Round a sub-block under its scale and the neighbors of it; return the levels and the scale of least error.

        Args:
            old, gradient: float32 (n, size, rows).
            scale: float32 (n, 1, rows).
            matrix: float32 (n, size, size).
        """
        scales, unit = self._grid.search.scales, self._grid.unit(scale)

        def option(steps: int) -> Option:
            moved = scales.moved(scale, steps) if steps else scale
            levels, after = self._round(old, moved, gradient, matrix, unit if steps else None)
            change = levels * self._grid.unit(moved) - old * unit
            # With c the change and g - H c the gradient after it, the error changes by c H c^T - 2 c g.
            return -sum_channels(change * (gradient + after)), moved[:, 0], levels

        best, *others = (option(steps) for steps in _steps(scales))
        for other in others:
            best = better(other, best)
        return best[2], best[1]

    def _move(self, sub: int, levels: Tensor, gradient: Tensor, matrix: Tensor) -> None:
        """Move the scale and min of a sub-block to the best neighbors.

        Args:
            levels, gradient: float32 (n, size, rows).
            matrix: float32 (n, size, size).
        """
        rounded, search, block = self._rounded, self._grid.search, sub // self._rounded.subs_per_block
        steps = _steps(search.scales), _steps(search.mins)
        if len(steps[0]) == len(steps[1]) == 1:
            return
        product = exact_product(rounded_matrix(matrix), levels)
        of_levels, of_ones = sum_channels(levels * gradient), sum_channels(gradient)
        squares, mixed = sum_channels(levels * product), sum_channels(product)
        # Float32 sums could depend on threads.
        ones = matrix.double().sum((1, 2)).float()[:, None]
        scale, minimum = rounded.scales[:, sub], rounded.mins[:, sub]

        # (n, steps of the scale, steps of the min, rows)
        scales = torch.stack([search.scales.moved(scale, step) for step in steps[0]], 1)[:, :, None]
        mins = torch.stack([search.mins.moved(minimum, step) for step in steps[1]], 1)[:, None]
        a = rounded.d[:, block, None, None] * (scales - scale[:, None, None])
        b = rounded.dmin[:, block, None, None] * (mins - minimum[:, None, None])
        squares, of_levels, ones, of_ones, mixed = (
            values[:, None, None] for values in (squares, of_levels, ones, of_ones, mixed)
        )
        costs = a * (a * squares - 2 * of_levels) + b * (b * ones + 2 * of_ones - 2 * a * mixed)
        options = (values.expand_as(costs).flatten(1, 2).unbind(1) for values in (costs, scales, mins))
        best, *others = zip(*options, strict=True)
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


def _steps(scales: Scales) -> tuple[int, ...]:
    return (0,) if scales.is_fixed else (0, -1, 1)
