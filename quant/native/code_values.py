"""What the codes of W4A8 and W6A8 stand for: a table of 16 values, or integers.

Source: comfy_kitchen 0.2.40 tensor/w4a8_packed.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..device import cached_on_device
from .packing import pack_nibbles, pack_six_bits, unpack_nibbles, unpack_six_bits

# The values with the least error for normally distributed weights, relative to about the largest of 16; from kitchen.
_CODEBOOK = (
    *(-0.980602, -0.794529, -0.638165, -0.500986, -0.377321, -0.263187, -0.155210, -0.050720),
    *(0.052541, 0.156985, 0.265284, 0.379533, 0.502636, 0.638953, 0.794876, 0.980671),
)
BINS = 1 << 12
"""Bins of the interval from -1 to 1, in each of which lies at most one value of a table."""
_MAX_INTEGER = 31


class CodeValues(ABC):
    """The values of codes, in order."""

    bits: int
    top: float
    """A group's largest magnitude divided by this is where the search for its scale begins."""
    stored: bool
    """Whether the file has the table."""

    @abstractmethod
    def table(self, device: torch.device) -> Tensor:
        """Return the value of each code: float32, (codes,)."""

    @abstractmethod
    def around(self, scaled: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values below and above numbers, float32 of any shape; equal where only one is near.

        Of the levels of an integer grid to which all values are rounded, that of one of these two is the nearest: a
        value is moved by half a level at most, and its neighbor beyond is at least half a level away. Where values of a
        fitted table lie closer, the error may be a fraction of a level larger.
        """

    @abstractmethod
    def codes(self, scaled: Tensor, upper: Tensor) -> Tensor:
        """Return the codes of the values that `around` returns: uint8, of any shape.

        Args:
            scaled: float32, of any shape.
            upper: bool, whether to take the value above.
        """

    @abstractmethod
    def pack(self, codes: Tensor) -> Tensor:
        """Pack codes, uint8 (n, columns): uint8, (n, bytes)."""

    @abstractmethod
    def unpack(self, packed: Tensor) -> Tensor:
        """Undo `pack`: uint8 (n, bytes) to uint8 (n, columns)."""

    def nearest(self, scaled: Tensor) -> Tensor:
        """Return the values nearest to numbers, float32 of any shape, the lower one of two at the same distance."""
        lower, upper = self.around(scaled)
        return torch.where((scaled - upper).abs_() < (scaled - lower).abs_(), upper, lower)


@dataclass(frozen=True)
class Codebook(CodeValues):
    """A table of 16 rising values of at most about 1; at least two bins of the interval lie between neighbors.

    Args:
        values: by default those of kitchen's frozen table. Another table costs the fast kernel for few tokens.
    """

    values: tuple[float, ...] = _CODEBOOK

    bits, top, stored = 4, 1.0, True

    def table(self, device: torch.device) -> Tensor:
        return _bins(self.values, device)[0]

    def around(self, scaled: Tensor) -> tuple[Tensor, Tensor]:
        _, _, lower, upper = _bins(self.values, scaled.device)
        index = _bin_of(scaled)
        return _look_up(lower, index), _look_up(upper, index)

    def codes(self, scaled: Tensor, upper: Tensor) -> Tensor:
        return _look_up(_bins(self.values, scaled.device)[1], _bin_of(scaled)) + upper

    def pack(self, codes: Tensor) -> Tensor:
        return pack_nibbles(codes)

    def unpack(self, packed: Tensor) -> Tensor:
        return unpack_nibbles(packed)


class Integers(CodeValues):
    """The integers from -31 to 31, as codes from 1 to 63."""

    bits, top, stored = 6, float(_MAX_INTEGER), False

    def table(self, device: torch.device) -> Tensor:
        return torch.arange(64, device=device, dtype=torch.float32) - 32

    def around(self, scaled: Tensor) -> tuple[Tensor, Tensor]:
        return scaled.floor().clamp_(-_MAX_INTEGER, _MAX_INTEGER), scaled.ceil().clamp_(-_MAX_INTEGER, _MAX_INTEGER)

    def nearest(self, scaled: Tensor) -> Tensor:
        return scaled.round().clamp_(-_MAX_INTEGER, _MAX_INTEGER)

    def codes(self, scaled: Tensor, upper: Tensor) -> Tensor:
        lower, above = self.around(scaled)
        return torch.where(upper, above, lower).add_(32).to(torch.uint8)

    def pack(self, codes: Tensor) -> Tensor:
        return pack_six_bits(codes)

    def unpack(self, packed: Tensor) -> Tensor:
        return unpack_six_bits(packed)


def _bin_of(scaled: Tensor) -> Tensor:
    return (scaled * (BINS // 2)).add_(BINS // 2).clamp_(0, BINS - 1).int()


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    # Several times faster on a CPU than table[index].
    return table.index_select(0, index.flatten()).view_as(index)


@cached_on_device
def _bins(values: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the table, and for each bin the code below it and the values below and above.

    In a bin with a value of the table that value is the nearest by far, and so both.
    """
    table = torch.tensor(values)
    edges = torch.arange(BINS + 1) / (BINS // 2) - 1
    below_start, below_end = (torch.bucketize(edge, table, right=True) for edge in (edges[:-1], edges[1:]))
    has_value = below_end > below_start
    lower = torch.where(has_value, below_start, below_start - 1).clamp_(0, len(table) - 1)
    upper = torch.where(has_value, lower, below_start).clamp_(0, len(table) - 1)
    tensors = table, lower.to(torch.uint8), table[lower], table[upper]
    return tuple(tensor.to(device) for tensor in tensors)  # type: ignore[return-value]
