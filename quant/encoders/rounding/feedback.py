"""Rounding with error feedback (GPTQ), where each sub-block gets its scale and min when its turn comes.

Source: GPTQ (arXiv 2210.17323), algorithm 1, in the order of the input channels. There, scales are chosen beforehand.
Here, they fit the weights as the errors before have left them, and the best of several is kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...device import elements_at_a_time
from ..search.fit import BlockScales
from ..search.sub_blocks import SubBlocks
from .exact import exact_product, rounded_matrix, sum_channels
from .grid import Grid
from .moments import SpanMoments
from .small_matrices import diagonal_blocks, times, triangular_inverse

_Choice = tuple[tuple[Tensor, Tensor], float]
"""An integer scale and min, float32 (n, rows), and an offset."""
Option = tuple[Tensor, ...]
"""A cost, float32 (n, rows), and what has it, (n, rows) or (n, channels, rows)."""


@dataclass
class Rounded:
    """A rounded weight by channel, unit * level - dmin * min; the first axis are runs of `span` input channels.

    Args:
        levels: float32 (n, span, rows).
        d, dmin: float16 values as float32, (n, blocks, rows).
        scales, mins: as the grid can store them, float32 (n, sub-blocks, rows).
    """

    grid: Grid
    levels: Tensor
    d: Tensor
    dmin: Tensor
    scales: Tensor
    mins: Tensor

    @property
    def subs_per_block(self) -> int:
        return self.scales.shape[1] // self.d.shape[1]

    def values(self, subs: slice) -> Tensor:
        """Return the values of some sub-blocks, float32 (n, channels, rows)."""
        scale, minimum = self.effective(subs)
        size = self.levels.shape[1] // self.scales.shape[1]
        levels = self.levels[:, subs.start * size : subs.stop * size]
        return self.grid.unit(scale).repeat_interleave(size, 1).mul_(levels).sub_(minimum.repeat_interleave(size, 1))

    def effective(self, subs: slice) -> tuple[Tensor, Tensor]:
        """Return the effective scales and mins of some sub-blocks, float32 (n, sub-blocks, rows)."""
        blocks = [sub // self.subs_per_block for sub in range(subs.start, subs.stop)]
        return self.d[:, blocks] * self.scales[:, subs], self.dmin[:, blocks] * self.mins[:, subs]

    def blocks(self) -> Iterator[tuple[BlockScales, Tensor]]:
        """Yield for each block its scales, of n * rows blocks, and its levels, float32 (n * rows, block_size)."""
        fields = (self.levels, self.d, self.dmin, self.scales, self.mins)
        parts = [values.tensor_split(self.d.shape[1], 1) for values in fields]
        for levels, d, dmin, scales, mins in zip(*parts, strict=True):
            factors = (values.reshape(-1) for values in (d, dmin))
            integers = (values.transpose(1, 2).reshape(d.numel(), -1) for values in (scales, mins))
            yield BlockScales(*factors, *integers), levels.transpose(1, 2).reshape(d.numel(), -1)


def round_with_feedback(
    grid: Grid, block_size: int, weight: Tensor, importance: Tensor, moments: SpanMoments, *, neighbors: bool
) -> Rounded:
    """Round a weight, each sub-block for the weights as the errors before have left them.

    Args:
        weight: float32 (n, span, rows).
        importance: float32 (n, span, rows), the importance of each weight in the search for a block's scales.
        neighbors: whether a sub-block also tries the neighbors of the scale and min that its search found.
    """
    n, span, rows = weight.shape
    remaining, spread, factors = weight.clone(), rounded_matrix(moments.feedback.mT), moments.feedback.float()
    # Calls cost more than the arithmetic of a few rows. On a CPU, what is rounded at once stays in its cache.
    at_once = max(1, elements_at_a_time(weight.device) // (n * grid.size * rows))
    rounded = []
    for start in range(0, span, block_size):
        block = slice(start, start + block_size)
        blocks, weights = (v[:, block].transpose(1, 2).reshape(-1, block_size) for v in (remaining, importance))
        scales = grid.fit_scales(SubBlocks.from_blocks(blocks, weights, grid.size), n * rows)
        turns = _Turns(grid, neighbors, at_once, *(_by_channel(values, n, rows) for values in scales.fields()))
        levels = []
        for sub in range(block_size // grid.size):
            first = start + sub * grid.size
            channels, later = slice(first, first + grid.size), slice(first + grid.size, span)
            chosen, errors = turns.take(sub, remaining[:, channels], factors[:, channels, channels])
            remaining[:, later] -= exact_product(spread[:, later, channels], errors)
            levels.append(chosen)
        rounded.append((torch.cat(levels, 1), turns.d, turns.dmin, turns.scales, turns.mins))
    return Rounded(grid, *(torch.cat(parts, 1) for parts in zip(*rounded, strict=True)))


def better(option: Option, than: Option) -> Option:
    """Return for each row the option of lower cost; the second where both are equal."""
    is_lower = option[0] < than[0]
    return tuple(
        torch.where(is_lower if value.ndim == 2 else is_lower[:, None], value, other)
        for value, other in zip(option, than, strict=True)
    )


def _by_channel(values: Tensor, n: int, rows: int) -> Tensor:
    """Return what belongs to n * rows blocks, (n * rows, k) or (n * rows,), as (n, k, rows)."""
    return values.view(n, rows, -1).transpose(1, 2).contiguous()


@dataclass
class _Turns:
    """The scales of one block of every row; its sub-blocks change theirs one after the other.

    Args:
        at_once: with how many scales and mins a sub-block is rounded in one call.
    """

    grid: Grid
    neighbors: bool
    at_once: int
    d: Tensor
    dmin: Tensor
    scales: Tensor
    mins: Tensor

    def take(self, sub: int, weight: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the scale and min of a sub-block, and round its weights.

        Args:
            weight: float32 (n, size, rows).
            factors: float32 (n, size, size), the part of `SpanMoments.feedback` for these channels.

        Returns:
            The levels, and the errors that spread over the later channels; both float32 (n, size, rows).
        """
        together = self.grid.together
        groups = [slice(first, first + together) for first in range(0, weight.shape[1], together)]
        costs = triangular_inverse(diagonal_blocks(factors, together)).unbind(1)
        choices = list(itertools.product(self._integers(sub, weight, factors), self.grid.offsets))
        best, *others = (
            option
            for first in range(0, len(choices), self.at_once)
            for option in self._options(
                weight, factors, list(zip(groups, costs, strict=True)), choices[first : first + self.at_once]
            )
        )
        for other in others:
            best = better(other, best)
        _, self.scales[:, sub], self.mins[:, sub], levels, errors = best
        return levels, errors

    def _integers(self, sub: int, weight: Tensor, factors: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """Return the integer scales and mins to try, float32 (n, rows): those of the block's search come first."""
        found = self.scales[:, sub], self.mins[:, sub]
        scales, mins = self.grid.search.scales, self.grid.search.mins
        if scales.is_fixed:
            return [found]
        # A unit of error costs this much once the later channels make up for it.
        costs = factors.diagonal(dim1=1, dim2=2).reciprocal().square().t()[:, :, None]
        x = weight.transpose(0, 1).contiguous()
        sub_blocks = SubBlocks(x.flatten(1), (costs / costs.mean(0)).expand_as(x).flatten(1))
        searched = self.grid.fit_integers(sub_blocks, self.d.flatten(), self.dmin.flatten())
        scale, minimum = (values.view_as(found[0]) for values in searched)
        options = [found, (scale, minimum)] if self.grid.has_factors else [(scale, minimum)]
        if self.neighbors:
            options += [(scales.moved(scale, steps), minimum) for steps in (-1, 1)]
            if not mins.is_fixed:
                options += [(scale, mins.moved(minimum, steps)) for steps in (-1, 1)]
        return options

    def _options(
        self, weight: Tensor, factors: Tensor, groups: Sequence[tuple[slice, Tensor]], choices: Sequence[_Choice]
    ) -> Iterator[Option]:
        """Round a sub-block with each choice in its order; the errors of a group spread over the later groups."""
        rows = weight.shape[2]
        # The rows with the first choice, then those with the second, and so on.
        scale, minimum = (torch.cat(values, 1) for values in zip(*(integers for integers, _ in choices), strict=True))
        offset: float | Tensor = self.grid.offsets[0]
        if len(self.grid.offsets) > 1:
            offset = torch.cat([torch.full_like(weight[:, 0], own) for _, own in choices], 1)
        real, least = (
            factor.repeat(1, len(choices)) * integers
            for factor, integers in ((self.d[:, 0], scale), (self.dmin[:, 0], minimum))
        )
        shifted = weight.repeat(1, 1, len(choices)) + least[:, None]
        round_group, unit = self.grid.rounding(real, offset), self.grid.unit(real)
        levels, errors = torch.empty_like(shifted), torch.empty_like(shifted)
        for group, costs in groups:
            levels[:, group] = round_group(shifted[:, group], costs)
            error = shifted[:, group].addcmul_(levels[:, group], unit[:, None], value=-1)
            errors[:, group] = times(error, costs)
            for channel in range(group.start, group.stop):
                later = factors[:, channel, group.stop :, None]
                shifted[:, group.stop :].addcmul_(later, errors[:, channel, None], value=-1)
        found = sum_channels(errors.square()), scale, minimum, levels, errors
        yield from zip(*(torch.split(values, rows, -1) for values in found), strict=True)
