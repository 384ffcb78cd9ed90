"""One encoder for each type: its integers, its sub-blocks and how far it looks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...formats.iq4 import KVALUES, pack_iq4_nl, pack_iq4_xs
from ...formats.kquants import pack_q2_k, pack_q3_k, pack_q4_k, pack_q5_k, pack_q6_k
from ...formats.legacy import pack_q4_0, pack_q4_1, pack_q5_0, pack_q5_1, pack_q8_0
from .columns import Columns
from .constants import encode_constants_once
from .fit import Blocks, Search, fit, refine
from .levels import Codebook, Integers, Levels
from .scale import search_scale, search_scale_and_min

Pack = Callable[[Blocks, Tensor], Tensor]
"""Blocks and their codes (n, block_size) -> (n, type_size) uint8."""

_NONE, _ONE = Integers(0, 0), Integers(1, 1)
_IQ4 = Codebook(KVALUES)


@dataclass(frozen=True)
class _Tries:
    """How many peaks (for either sign of the scale), starts and rounds an encoder tries."""

    peaks: int
    starts: int
    rounds: int


_BEST = _Tries(peaks=13, starts=3, rounds=3)
_BEST_WITH_MIN = _Tries(peaks=17, starts=3, rounds=3)
# Eight levels need no finer grid.
_BEST_OF_EIGHT = _Tries(peaks=5, starts=3, rounds=3)
_BEST_ALONE = _Tries(peaks=16, starts=1, rounds=3)
# More levels lie closer together.
_BEST_OF_256 = _Tries(peaks=24, starts=1, rounds=3)
_BEST_ALONE_WITH_MIN = _Tries(peaks=20, starts=1, rounds=3)


@dataclass(frozen=True)
class Encoder:
    """Fits the scales of blocks, and then rounds the weights to them.

    Args:
        size: weights of a sub-block.
        peak: the level where the largest weight of a sub-block falls.
    """

    size: int
    levels: Levels
    peak: int
    peaks: Sequence[float]
    search: Search
    pack: Pack

    def __call__(self, blocks: Tensor, importance: Tensor | None = None) -> Tensor:
        return encode_constants_once(self._search, blocks, importance)

    def _search(self, blocks: Tensor, importance: Tensor | None) -> Tensor:
        columns = Columns.of(blocks, importance, self.size)
        found = self.fit(columns, len(blocks))
        levels = found.nearest(columns, self.levels)[0].t()
        return self.encode(found, levels.reshape(blocks.shape))

    def fit(self, columns: Columns, n_blocks: int) -> Blocks:
        """The scales, and mins if the type has these, of least squared error."""
        start = self._scales(columns, self.peaks)
        scale, minimum = (values.view(n_blocks, -1) for values in start)
        first = fit(columns, self.levels, scale, minimum, self.search)
        return refine(columns, self.levels, first, self._starts, self.search)

    def encode(self, found: Blocks, levels: Tensor) -> Tensor:
        """Bytes of blocks whose weights have these levels, (n, block_size)."""
        return self.pack(found, self.levels.codes(levels))

    def _scales(self, columns: Columns, peaks: Sequence[float]) -> tuple[Tensor, Tensor]:
        scale = search_scale(columns, self.levels, peaks, stored=self.search.scales == _ONE)
        return scale, torch.zeros_like(scale)

    def _starts(self, part: Columns) -> list[tuple[Tensor, Tensor]]:
        largest = part.extreme()
        fine = [sign * (self.peak + step / 10) for step in range(-9, 10) for sign in (-1, 1)]
        scales = [largest / anchor for anchor in self.levels.anchors()]
        return [*((scale, torch.zeros_like(scale)) for scale in scales), self._scales(part, fine)]


class EncoderWithMin(Encoder):
    """Sub-blocks have a minimum beside the scale."""

    def _scales(self, columns: Columns, peaks: Sequence[float], *, zero: bool = False) -> tuple[Tensor, Tensor]:
        signed = self.search.mins == _ONE
        return search_scale_and_min(columns, self.levels, peaks, signed=signed, zero=zero)

    def _starts(self, part: Columns) -> list[tuple[Tensor, Tensor]]:
        # Where the mins may have either sign, weights of one sign may still be best with none.
        low, high = part.x.amin(0).clamp_(max=0), part.x.amax(0).clamp_(min=0)
        fine = [self.peak + step / 10 for step in range(-9, 10)]
        return [((high - low) / self.peak, -low), self._scales(part, fine, zero=True)]


def _affine(size: int, largest: int, integers: Integers, tries: _Tries, pack: Pack) -> Encoder:
    """Codes in [0, largest] of sub-blocks of `size`, whose scales and mins are `integers`."""
    peaks = [largest, *_peaks(largest, tries.peaks, max(1.0, largest / 10))]
    starts = range(integers.high, integers.high - tries.starts, -1)
    search = Search(integers, integers, starts, tries.rounds)
    return EncoderWithMin(size, Integers(0, largest), largest, peaks, search, pack)


def _signed(size: int, levels: Levels, peak: int, integers: Integers, tries: _Tries, pack: Pack) -> Encoder:
    """Sub-blocks of `size` without a min, whose scales are `integers`."""
    peaks = _peaks(peak, tries.peaks, max(1.0, peak / 5))
    both = [-peak, *peaks, *(-value for value in peaks)]
    search = Search(integers, _NONE, (integers.low, integers.high)[: tries.starts], tries.rounds)
    return Encoder(size, levels, peak, both, search, pack)


def _peaks(largest: int, count: int, reach: float) -> list[float]:
    """`count` real numbers around the largest level, more of them below: less clipping costs less than more."""
    return [largest + reach * (1.7 * index / (count - 1) - 1) for index in range(count)]


def _q2_k(blocks: Blocks, codes: Tensor) -> Tensor:
    return pack_q2_k(*blocks.fields(), codes)


def _q3_k(blocks: Blocks, codes: Tensor) -> Tensor:
    return pack_q3_k(blocks.d, blocks.scales, codes)


def _q4_k(blocks: Blocks, codes: Tensor) -> Tensor:
    return pack_q4_k(*blocks.fields(), codes)


def _q5_k(blocks: Blocks, codes: Tensor) -> Tensor:
    return pack_q5_k(*blocks.fields(), codes)


def _q6_k(blocks: Blocks, codes: Tensor) -> Tensor:
    return pack_q6_k(blocks.d, blocks.scales, codes)


def _iq4_xs(blocks: Blocks, codes: Tensor) -> Tensor:
    return pack_iq4_xs(blocks.d, blocks.scales, codes)


def _iq4_nl(blocks: Blocks, codes: Tensor) -> Tensor:
    return pack_iq4_nl(blocks.d, codes)


def _q4_0(blocks: Blocks, codes: Tensor) -> Tensor:
    return pack_q4_0(blocks.d[:, None], codes + 8)


def _q4_1(blocks: Blocks, codes: Tensor) -> Tensor:
    return pack_q4_1(*_d_and_min(blocks), codes)


def _q5_0(blocks: Blocks, codes: Tensor) -> Tensor:
    return pack_q5_0(blocks.d[:, None], codes + 16)


def _q5_1(blocks: Blocks, codes: Tensor) -> Tensor:
    return pack_q5_1(*_d_and_min(blocks), codes)


def _q8_0(blocks: Blocks, codes: Tensor) -> Tensor:
    return pack_q8_0(blocks.d[:, None], codes)


def _d_and_min(blocks: Blocks) -> tuple[Tensor, Tensor]:
    return blocks.d[:, None], (0.0 - blocks.dmin)[:, None]


best_q2_k = _affine(16, 3, Integers(0, 15), _BEST_WITH_MIN, _q2_k)
best_q3_k = _signed(16, Integers(-4, 3), 4, Integers(-32, 31), _BEST_OF_EIGHT, _q3_k)
best_q4_k = _affine(32, 15, Integers(0, 63), _BEST_WITH_MIN, _q4_k)
best_q5_k = _affine(32, 31, Integers(0, 63), _BEST_WITH_MIN, _q5_k)
best_q6_k = _signed(16, Integers(-32, 31), 32, Integers(-128, 127), _BEST, _q6_k)
best_iq4_xs = _signed(32, _IQ4, 127, Integers(-32, 31), _BEST, _iq4_xs)
best_iq4_nl = _signed(32, _IQ4, 127, _ONE, _BEST_ALONE, _iq4_nl)
best_q4_0 = _signed(32, Integers(-8, 7), 8, _ONE, _BEST_ALONE, _q4_0)
best_q4_1 = _affine(32, 15, _ONE, _BEST_ALONE_WITH_MIN, _q4_1)
best_q5_0 = _signed(32, Integers(-16, 15), 16, _ONE, _BEST_ALONE, _q5_0)
best_q5_1 = _affine(32, 31, _ONE, _BEST_ALONE_WITH_MIN, _q5_1)
best_q8_0 = _signed(32, Integers(-128, 127), 128, _ONE, _BEST_OF_256, _q8_0)
