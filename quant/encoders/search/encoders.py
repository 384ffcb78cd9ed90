"""The encoder of each type: its sub-blocks, its integers, and how many anchors, starts and rounds its search tries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...formats.iq4 import KVALUES, pack_iq4_nl, pack_iq4_xs
from ...formats.kquants import pack_q2_k, pack_q3_k, pack_q4_k, pack_q5_k, pack_q6_k
from ...formats.legacy import pack_q4_0, pack_q4_1, pack_q5_0, pack_q5_1, pack_q8_0
from .constants import encode_constants_once
from .fit import BlockScales, SearchSettings, fit_scales, refine
from .levels import Codebook, Integers, Levels, ScaledLevels
from .scale import search_scale, search_scale_and_min
from .sub_blocks import SubBlocks, reciprocal_or_zero, round_to_float16

Pack = Callable[[BlockScales, Tensor], Tensor]
"""Writes blocks from their scales and their codes, float32 (n, block_size): returns uint8 (n, type_size)."""

# Ranges of a single integer, for types that store no integer scale or min: d or dmin then counts alone, or there is no
# min at all.
_ONE, _ZERO = Integers(1, 1), Integers(0, 0)
_IQ4 = Codebook(KVALUES)


@dataclass(frozen=True)
class _Counts:
    """How many anchors (for each sign of the scale), starts and rounds an encoder tries."""

    anchors: int
    starts: int
    rounds: int


# Of the anchors, every second one finds a scale that is to be rounded to an integer.
_EVERY = 2
_WITH_SCALES = _Counts(anchors=13, starts=3, rounds=3)
_WITH_SCALES_AND_MINS = _Counts(anchors=17, starts=3, rounds=3)
# Eight levels need no finer grid of anchors.
_EIGHT_LEVELS = _Counts(anchors=5, starts=3, rounds=3)
_ONE_SCALE = _Counts(anchors=16, starts=1, rounds=3)
# With more levels, good anchors lie closer together.
_256_LEVELS = _Counts(anchors=24, starts=1, rounds=3)
_ONE_SCALE_AND_MIN = _Counts(anchors=20, starts=1, rounds=3)


@dataclass(frozen=True)
class Encoder(ScaledLevels):
    """An encoder that first searches for the scales of blocks and then rounds the weights.

    Args:
        size: the number of weights in a sub-block.
        levels: the reconstruction levels of the type.
        anchor: the magnitude of the level that the weight of largest magnitude in a sub-block is mapped to.
        anchors: the real numbers around it that the search for the scale of a sub-block tries.
        search: the integers of the type, and how many of them are tried.
        pack: writes the blocks.
    """

    size: int
    levels: Levels
    anchor: int
    anchors: Sequence[float]
    search: SearchSettings
    pack: Pack
    together: ClassVar[int] = 1
    offsets: ClassVar[tuple[float, ...]] = (0.0,)

    def __call__(self, blocks: Tensor, importance: Tensor | None = None) -> Tensor:
        """Encode blocks, float32 (n, block_size), with importance of the same shape, to uint8 (n, type_size)."""
        return encode_constants_once(self._encode, blocks, importance)

    def fit_scales(self, sub_blocks: SubBlocks, n_blocks: int) -> BlockScales:
        """Search for the scales of least squared error, and for the mins if the type has any."""
        scale, minimum = (values.view(n_blocks, -1) for values in self._real_scales(sub_blocks, self.anchors))
        found = fit_scales(sub_blocks, self.levels, scale, minimum, self.search)
        return refine(sub_blocks, self.levels, found, self._refined_starts, self.search)

    def fit_integers(self, sub_blocks: SubBlocks, d: Tensor, dmin: Tensor) -> tuple[Tensor, Tensor]:
        """Search for the integer scales and mins of n sub-blocks whose d and dmin are given, all float32 (n,)."""
        scale, minimum = self._real_scales(sub_blocks, self.anchors[::_EVERY])
        scales = self.search.scales.nearest(scale * reciprocal_or_zero(d))
        return scales, self.search.mins.nearest(minimum * reciprocal_or_zero(dmin))

    def rounding(self, scale: Tensor, offset: float | Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the function that rounds values, float32 (n, 1, rows), under a scale of each row, (n, rows)."""
        unit = reciprocal_or_zero(scale)[:, None]
        return lambda values, _: self.levels.nearest(values * unit)

    def storable(self, factors: Tensor) -> Tensor:
        """Round values of d and dmin to what a block can store, float32 of any shape."""
        return round_to_float16(factors)

    def offset(self, levels: Tensor) -> float:
        """Return what a type adds to its levels, float32 (n, size, rows): these types add nothing."""
        return 0.0

    def pack_levels(self, scales: BlockScales, levels: Tensor) -> Tensor:
        """Write blocks whose weights have these levels, float32 (n, block_size), as uint8 (n, type_size)."""
        return self.pack(scales, self.levels.codes(levels))

    def _encode(self, blocks: Tensor, importance: Tensor | None) -> Tensor:
        sub_blocks = SubBlocks.from_blocks(blocks, importance, self.size)
        scales = self.fit_scales(sub_blocks, len(blocks))
        levels = scales.round(sub_blocks, self.levels)[0].t()
        return self.pack_levels(scales, levels.reshape(blocks.shape))

    def _real_scales(self, sub_blocks: SubBlocks, anchors: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Return the real-valued scale and min of each sub-block, float32 (n,)."""
        scale = search_scale(sub_blocks, self.levels, anchors, is_stored=self.search.scales == _ONE)
        return scale, torch.zeros_like(scale)

    def _refined_starts(self, sub_blocks: SubBlocks) -> list[tuple[Tensor, Tensor]]:
        """Return the real-valued scales and mins that `refine` begins with, float32 (n,)."""
        amax = sub_blocks.signed_amax()
        fine = [sign * (self.anchor + step / 10) for step in range(-9, 10) for sign in (-1, 1)]
        scales = [amax / level for level in self.levels.anchor_levels()]
        return [*((scale, torch.zeros_like(scale)) for scale in scales), self._real_scales(sub_blocks, fine)]


class EncoderWithMin(Encoder):
    """An encoder for types whose sub-blocks have a min besides the scale."""

    def _real_scales(
        self, sub_blocks: SubBlocks, anchors: Sequence[float], *, through_zero: bool = False
    ) -> tuple[Tensor, Tensor]:
        signed = self.search.mins == _ONE
        return search_scale_and_min(sub_blocks, self.levels, anchors, signed=signed, through_zero=through_zero)

    def _refined_starts(self, sub_blocks: SubBlocks) -> list[tuple[Tensor, Tensor]]:
        # The first start makes 0 an exact level, also where all weights have one sign and mins may have either.
        low, high = sub_blocks.x.amin(0).clamp_(max=0), sub_blocks.x.amax(0).clamp_(min=0)
        fine = [self.anchor + step / 10 for step in range(-9, 10)]
        return [((high - low) / self.anchor, -low), self._real_scales(sub_blocks, fine, through_zero=True)]


def _with_min(size: int, largest: int, integers: Integers, counts: _Counts, pack: Pack) -> Encoder:
    """Return the encoder of a type with codes 0 to `largest`, whose integer scales and mins are `integers`."""
    anchors = [largest, *_anchors(largest, counts.anchors, max(1.0, largest / 10))]
    starts = range(integers.high, integers.high - counts.starts, -1)
    search = SearchSettings(integers, integers, starts, counts.rounds)
    return EncoderWithMin(size, Integers(0, largest), largest, anchors, search, pack)


def _without_min(size: int, levels: Levels, anchor: int, integers: Integers, counts: _Counts, pack: Pack) -> Encoder:
    """Return the encoder of a type whose sub-blocks have integer scales in `integers` and no min."""
    anchors = _anchors(anchor, counts.anchors, max(1.0, anchor / 5))
    both_signs = [-anchor, *anchors, *(-value for value in anchors)]
    search = SearchSettings(integers, _ZERO, (integers.low, integers.high)[: counts.starts], counts.rounds)
    return Encoder(size, levels, anchor, both_signs, search, pack)


def _anchors(anchor: int, count: int, reach: float) -> list[float]:
    """Return `count` real numbers around an anchor, from `reach` below it to 0.7 * `reach` above it.

    More of them lie below, because clipping the largest weight (an anchor above) rarely pays.
    """
    return [anchor + reach * (1.7 * index / (count - 1) - 1) for index in range(count)]


def _q2_k(blocks: BlockScales, codes: Tensor) -> Tensor:
    return pack_q2_k(*blocks.fields(), codes)


def _q3_k(blocks: BlockScales, codes: Tensor) -> Tensor:
    return pack_q3_k(blocks.d, blocks.scales, codes)


def _q4_k(blocks: BlockScales, codes: Tensor) -> Tensor:
    return pack_q4_k(*blocks.fields(), codes)


def _q5_k(blocks: BlockScales, codes: Tensor) -> Tensor:
    return pack_q5_k(*blocks.fields(), codes)


def _q6_k(blocks: BlockScales, codes: Tensor) -> Tensor:
    return pack_q6_k(blocks.d, blocks.scales, codes)


def _iq4_xs(blocks: BlockScales, codes: Tensor) -> Tensor:
    return pack_iq4_xs(blocks.d, blocks.scales, codes)


def _iq4_nl(blocks: BlockScales, codes: Tensor) -> Tensor:
    return pack_iq4_nl(blocks.d, codes)


def _q4_0(blocks: BlockScales, codes: Tensor) -> Tensor:
    return pack_q4_0(blocks.d[:, None], codes + 8)


def _q4_1(blocks: BlockScales, codes: Tensor) -> Tensor:
    return pack_q4_1(*_d_and_min(blocks), codes)


def _q5_0(blocks: BlockScales, codes: Tensor) -> Tensor:
    return pack_q5_0(blocks.d[:, None], codes + 16)


def _q5_1(blocks: BlockScales, codes: Tensor) -> Tensor:
    return pack_q5_1(*_d_and_min(blocks), codes)


def _q8_0(blocks: BlockScales, codes: Tensor) -> Tensor:
    return pack_q8_0(blocks.d[:, None], codes)


def _d_and_min(blocks: BlockScales) -> tuple[Tensor, Tensor]:
    return blocks.d[:, None], (0.0 - blocks.dmin)[:, None]


best_q2_k = _with_min(16, 3, Integers(0, 15), _WITH_SCALES_AND_MINS, _q2_k)
best_q3_k = _without_min(16, Integers(-4, 3), 4, Integers(-32, 31), _EIGHT_LEVELS, _q3_k)
best_q4_k = _with_min(32, 15, Integers(0, 63), _WITH_SCALES_AND_MINS, _q4_k)
best_q5_k = _with_min(32, 31, Integers(0, 63), _WITH_SCALES_AND_MINS, _q5_k)
best_q6_k = _without_min(16, Integers(-32, 31), 32, Integers(-128, 127), _WITH_SCALES, _q6_k)
best_iq4_xs = _without_min(32, _IQ4, 127, Integers(-32, 31), _WITH_SCALES, _iq4_xs)
best_iq4_nl = _without_min(32, _IQ4, 127, _ONE, _ONE_SCALE, _iq4_nl)
best_q4_0 = _without_min(32, Integers(-8, 7), 8, _ONE, _ONE_SCALE, _q4_0)
best_q4_1 = _with_min(32, 15, _ONE, _ONE_SCALE_AND_MIN, _q4_1)
best_q5_0 = _without_min(32, Integers(-16, 15), 16, _ONE, _ONE_SCALE, _q5_0)
best_q5_1 = _with_min(32, 31, _ONE, _ONE_SCALE_AND_MIN, _q5_1)
best_q8_0 = _without_min(32, Integers(-128, 127), 128, _ONE, _256_LEVELS, _q8_0)
