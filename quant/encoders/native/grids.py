"""The grids of ComfyUI's formats: the levels of their weights, and the search for the scales of their groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...native.float8 import BLOCK as MXFP8_BLOCK
from ...native.float8 import FP8, MXFP8, TOP, nearest_e4m3
from ...native.levels import LevelsFormat
from ...native.native_format import NativeFormat
from ...native.nvfp4 import BLOCK as NVFP4_BLOCK
from ...native.nvfp4 import NVFP4, nearest_e2m1
from ...native.nvfp4 import TOP as NVFP4_TOP
from ...native.rowwise import RowScaled
from ..search.fit import BlockScales
from ..search.levels import Integers
from ..search.sub_blocks import SubBlocks, reciprocal_or_zero
from .scales import E4M3Scales, One, PowersOfTwo

Nearest = Callable[[Tensor, Tensor], Tensor]
"""Takes values and the scales of their groups, float32 that broadcast; returns the nearest levels."""

# Formats without scales of groups are rounded so many columns at a time.
_RUN = 16


@dataclass(frozen=True)
class StoredScales:
    """What a group stores: a scale, and no min."""

    scales: One | E4M3Scales | PowersOfTwo
    mins: ClassVar[Integers] = Integers(0, 0)


@dataclass(frozen=True)
class NativeGrid:
    """The levels of a format.

    Args:
        size: the number of weights that share a scale.
        search: the scales that they can have.
        nearest: rounds to levels.
        top: the largest level, or the largest value of a code. A search begins at the scale that maps the largest
            weight of a group to it.
        steps: the scales to try, in neighbors of the first one.
        scaled: whether a level counts as much as the scale of its group. Otherwise levels are values already.
        passes: how often the first scale is fitted to the levels that it gives.
    """

    size: int
    search: StoredScales
    nearest: Nearest
    top: float
    steps: tuple[int, ...] = ()
    scaled: bool = True
    passes: int = 0
    together: ClassVar[int] = 1
    offsets: ClassVar[tuple[float, ...]] = (0.0,)
    has_factors: ClassVar[bool] = False

    def unit(self, scale: Tensor) -> Tensor:
        """Return what a level counts, float32 of any shape."""
        return scale if self.scaled else torch.ones_like(scale)

    def fit_scales(self, sub_blocks: SubBlocks, n_blocks: int) -> BlockScales:
        """Return factors of 1 and scales of 1: each group searches for its own when its turn comes."""
        ones = torch.ones(n_blocks, device=sub_blocks.x.device)
        scales = torch.ones(n_blocks, sub_blocks.x.shape[1] // n_blocks, device=ones.device)
        return BlockScales(ones, torch.zeros_like(ones), scales, torch.zeros_like(scales))

    def fit_integers(self, sub_blocks: SubBlocks, d: Tensor, dmin: Tensor) -> tuple[Tensor, Tensor]:
        """Search for the scales of n groups, float32 (n,); the mins are 0."""
        scales = self.search.scales
        best = scales.nearest(sub_blocks.signed_amax().abs_() / self.top)
        for _ in range(self.passes):
            levels = self.nearest(sub_blocks.x, best)
            products, squares = sub_blocks.weighted_products(levels * reciprocal_or_zero(self.stands_for(best)))
            best = scales.nearest(products * reciprocal_or_zero(squares))
        least, first = self._error(sub_blocks, best), best
        for step in self.steps:
            moved = scales.moved(first, step)
            error = self._error(sub_blocks, moved)
            best, least = torch.where(error < least, moved, best), torch.minimum(error, least)
        return best, torch.zeros_like(best)

    def stands_for(self, scale: Tensor) -> Tensor:
        """Return what divides levels into values of codes, float32 of any shape."""
        return torch.ones_like(scale) if self.scaled else scale

    def rounding(self, scale: Tensor, offset: float | Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the function that rounds values, float32 (n, 1, rows), under a scale of each row, (n, rows)."""
        scale = scale[:, None]
        return lambda values, _: self.nearest(values, scale)

    def offset(self, levels: Tensor) -> float:
        """Return what is added to levels, float32 (n, size, rows): nothing."""
        return 0.0

    def storable(self, factors: Tensor) -> Tensor:
        """Return factors, float32 of any shape, as they are; there are none to fit."""
        return factors

    def _error(self, sub_blocks: SubBlocks, scale: Tensor) -> Tensor:
        values = self.nearest(sub_blocks.x, scale) * self.unit(scale)
        return sub_blocks.weighted_sum(values.sub_(sub_blocks.x).square_())


def grid_of(native: NativeFormat) -> NativeGrid:
    """Return the grid of a format."""
    match native:
        case RowScaled(top=top):
            return NativeGrid(_RUN, StoredScales(One()), _integers(top), top)
        case LevelsFormat(group=group, values=values):
            e4m3 = StoredScales(E4M3Scales())
            return NativeGrid(group, e4m3, native.nearest, values.top, (-1, 1), scaled=False, passes=1)
        case NVFP4():
            return NativeGrid(NVFP4_BLOCK, StoredScales(E4M3Scales()), _e2m1, NVFP4_TOP, (-2, -1, 1, 2, 3, 4, 5))
        case MXFP8():
            return NativeGrid(MXFP8_BLOCK, StoredScales(PowersOfTwo()), _e4m3, TOP)
        case FP8():
            return NativeGrid(_RUN, StoredScales(One()), _e4m3, TOP)
    raise TypeError(native.name)


def _integers(top: int) -> Nearest:
    return lambda values, scale: values.round().clamp_(-top, top)


def _e2m1(values: Tensor, scale: Tensor) -> Tensor:
    return nearest_e2m1(values * reciprocal_or_zero(scale))


def _e4m3(values: Tensor, scale: Tensor) -> Tensor:
    return nearest_e4m3(values * reciprocal_or_zero(scale)).float()
