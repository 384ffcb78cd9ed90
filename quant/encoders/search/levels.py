"""What a code can stand for: a range of integers or the entries of a codebook."""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Levels(Protocol):
    def nearest(self, values: Tensor) -> Tensor:
        """The level nearest to each value, float32; may overwrite `values`."""

    def codes(self, levels: Tensor) -> Tensor:
        """The code of each level, as the type's `pack` takes it."""

    def anchors(self) -> Sequence[int]:
        """Levels where the largest weight may fall."""


@dataclass(frozen=True)
class Integers:
    """The integers from `low` to `high`; each is its own code."""

    low: int
    high: int

    def nearest(self, values: Tensor) -> Tensor:
        return values.round_().clamp_(self.low, self.high)

    def codes(self, levels: Tensor) -> Tensor:
        return levels

    def anchors(self) -> Sequence[int]:
        return self.low, self.low + 1


@dataclass(frozen=True)
class Codebook:
    """Rising integers in [-128, 127]; the code is the index."""

    values: tuple[int, ...]

    def nearest(self, values: Tensor) -> Tensor:
        # Twice a value, rounded down, decides: the middle of two levels is a whole number or a half.
        return _look_up(_nearest(self.values, values.device), values.mul_(2).floor_().add_(256))

    def codes(self, levels: Tensor) -> Tensor:
        return _look_up(_codes(self.values, levels.device), levels + 128)

    def anchors(self) -> Sequence[int]:
        return self.values


@functools.cache
def _nearest(values: tuple[int, ...], device: torch.device) -> Tensor:
    """The level nearest to -128, -127.5, ... 127.5."""
    middles = [(low + high) / 2 for low, high in itertools.pairwise(values)]
    levels = [values[bisect.bisect(middles, half / 2)] for half in range(-256, 256)]
    return torch.tensor(levels, dtype=torch.float32, device=device)


@functools.cache
def _codes(values: tuple[int, ...], device: torch.device) -> Tensor:
    """The code of -128, -127, ... 127, of use for levels only."""
    codes = [bisect.bisect_left(values, level) for level in range(-128, 128)]
    return torch.tensor(codes, dtype=torch.float32, device=device)


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    flat = index.clamp_(0, len(table) - 1).int().flatten()
    return table.index_select(0, flat).view(index.shape)
