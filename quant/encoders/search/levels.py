"""Reconstruction levels: the numbers that codes stand for, either a range of integers or the entries of a codebook."""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor


class Levels(Protocol):
    """The reconstruction levels of a type."""

    def nearest(self, values: Tensor) -> Tensor:
        """Return the level nearest to each value, float32 of the same shape; may overwrite `values`."""

    def codes(self, levels: Tensor) -> Tensor:
        """Return the code of each level as the type's `pack_*` takes it, float32 of the same shape."""

    def anchor_levels(self) -> Sequence[int]:
        """Return the levels that the weight of largest magnitude may be mapped to exactly."""


@dataclass(frozen=True)
class Integers(Levels):
    """The integers from `low` to `high`; each is its own code."""

    low: int
    high: int
    step: int = 1
    """The distance of neighbors."""

    @property
    def is_fixed(self) -> bool:
        """True if there is one integer only, which a block then does not store."""
        return self.low == self.high

    def moved(self, values: Tensor, steps: int) -> Tensor:
        """Return the integers so many neighbors away, or the last one: float32, of the shape of `values`."""
        return self.nearest(values + steps * self.step)

    def nearest(self, values: Tensor) -> Tensor:
        return values.round_().clamp_(self.low, self.high)

    def codes(self, levels: Tensor) -> Tensor:
        return levels

    def anchor_levels(self) -> Sequence[int]:
        return self.low, self.low + 1


@dataclass(frozen=True)
class OddIntegers:
    """The odd integers from `low` to `high`, which are integer scales of IQ types."""

    low: int
    high: int
    step: int = 2
    """The distance of neighbors."""
    is_fixed: ClassVar[bool] = False

    def moved(self, values: Tensor, steps: int) -> Tensor:
        """Return the integers so many neighbors away, or the last one: float32, of the shape of `values`."""
        return self.nearest(values + steps * self.step)

    def nearest(self, values: Tensor) -> Tensor:
        """Return the odd integer nearest to each value, float32 of the same shape; may overwrite `values`."""
        return values.sub_(1).div_(2).round_().mul_(2).add_(1).clamp_(self.low, self.high)


@dataclass(frozen=True)
class Codebook(Levels):
    """A table of rising integers in [-128, 127]; the code of an entry is its index."""

    values: tuple[int, ...]

    def nearest(self, values: Tensor) -> Tensor:
        # The midpoint of two entries is an integer or a half, so twice a value, rounded down, finds its entry.
        return _look_up(_nearest_table(self.values, values.device), values.mul_(2).floor_().add_(256))

    def codes(self, levels: Tensor) -> Tensor:
        return _look_up(_code_table(self.values, levels.device), levels + 128)

    def anchor_levels(self) -> Sequence[int]:
        return self.values


class ScaledLevels:
    """A type whose values are d * scale * level - dmin * min, with factors d and dmin in every block."""

    has_factors: ClassVar[bool] = True

    def unit(self, scale: Tensor) -> Tensor:
        """Return what a level counts, float32 of any shape: the effective scale."""
        return scale


@functools.cache
def _nearest_table(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the entries nearest to -128, -127.5, ... 127.5, float32 (512,)."""
    midpoints = [(low + high) / 2 for low, high in itertools.pairwise(values)]
    nearest = [values[bisect.bisect(midpoints, half / 2)] for half in range(-256, 256)]
    return torch.tensor(nearest, dtype=torch.float32, device=device)


@functools.cache
def _code_table(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the codes of the integers -128 to 127, float32 (256,); only those of entries are used."""
    codes = [bisect.bisect_left(values, level) for level in range(-128, 128)]
    return torch.tensor(codes, dtype=torch.float32, device=device)


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    flat = index.clamp_(0, len(table) - 1).int().flatten()
    return table.index_select(0, flat).view(index.shape)
