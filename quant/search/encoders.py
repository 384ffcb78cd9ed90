"""One encoder for each type and effort: its integers, its sub-blocks and how far it looks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..bits import half_bytes, pack_bits
from ..iq4 import KVALUES, pack_iq4_nl, pack_iq4_xs
from ..kquants import pack_q2_k, pack_q3_k, pack_q4_k, pack_q5_k, pack_q6_k
from .columns import Columns
from .fit import Search, fit, refine
from .levels import Codebook, Integers, Levels
from .scale import search_scale, search_scale_and_min

_NONE, _ONE = Integers(0, 0), Integers(1, 1)
_IQ4 = Codebook(KVALUES)


@dataclass(frozen=True)
class _Effort:
    """How many peaks (for either sign of the scale), starts and rounds an encoder tries."""

    peaks: int
    starts: int
    rounds: int


_FAST = _Effort(peaks=6, starts=1, rounds=2)
_BEST = _Effort(peaks=13, starts=3, rounds=3)
_BEST_WITH_MIN = _Effort(peaks=9, starts=3, rounds=3)
_BEST_ALONE = _Effort(peaks=24, starts=1, rounds=3)
_BEST_ALONE_WITH_MIN = _Effort(peaks=40, starts=1, rounds=3)


def best_q2_k(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    return pack_q2_k(*_affine(blocks, importance, 16, 3, Integers(0, 15), _BEST_WITH_MIN))


def fast_q2_k(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    return pack_q2_k(*_affine(blocks, importance, 16, 3, Integers(0, 15), _FAST))


def best_q3_k(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    return pack_q3_k(*_signed(blocks, importance, 16, Integers(-4, 3), 4, Integers(-32, 31), _BEST))


def fast_q3_k(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    return pack_q3_k(*_signed(blocks, importance, 16, Integers(-4, 3), 4, Integers(-32, 31), _FAST))


def best_q4_k(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    return pack_q4_k(*_affine(blocks, importance, 32, 15, Integers(0, 63), _BEST_WITH_MIN))


def fast_q4_k(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    return pack_q4_k(*_affine(blocks, importance, 32, 15, Integers(0, 63), _FAST))


def best_q5_k(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    return pack_q5_k(*_affine(blocks, importance, 32, 31, Integers(0, 63), _BEST_WITH_MIN))


def fast_q5_k(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    return pack_q5_k(*_affine(blocks, importance, 32, 31, Integers(0, 63), _FAST))


def best_q6_k(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    return pack_q6_k(*_signed(blocks, importance, 16, Integers(-32, 31), 32, Integers(-128, 127), _BEST))


def fast_q6_k(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    return pack_q6_k(*_signed(blocks, importance, 16, Integers(-32, 31), 32, Integers(-128, 127), _FAST))


def best_iq4_xs(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    return pack_iq4_xs(*_signed(blocks, importance, 32, _IQ4, 127, Integers(-32, 31), _BEST))


def fast_iq4_xs(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    return pack_iq4_xs(*_signed(blocks, importance, 32, _IQ4, 127, Integers(-32, 31), _FAST))


def best_iq4_nl(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    d, _, codes = _signed(blocks, importance, 32, _IQ4, 127, _ONE, _BEST_ALONE)
    return pack_iq4_nl(d, codes)


def fast_iq4_nl(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    d, _, codes = _signed(blocks, importance, 32, _IQ4, 127, _ONE, _FAST)
    return pack_iq4_nl(d, codes)


def best_q4_0(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    d, _, codes = _signed(blocks, importance, 32, Integers(-8, 7), 8, _ONE, _BEST_ALONE)
    return torch.cat((half_bytes(d[:, None]), pack_bits(codes + 8, 4, run=16)), 1)


def best_q4_1(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    d, dmin, _, _, codes = _affine(blocks, importance, 32, 15, _ONE, _BEST_ALONE_WITH_MIN)
    return torch.cat((half_bytes(torch.stack((d, -dmin), 1)), pack_bits(codes, 4, run=16)), 1)


def best_q5_0(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    d, _, codes = _signed(blocks, importance, 32, Integers(-16, 15), 16, _ONE, _BEST_ALONE)
    return torch.cat((half_bytes(d[:, None]), _five_bits(codes + 16)), 1)


def best_q5_1(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    d, dmin, _, _, codes = _affine(blocks, importance, 32, 31, _ONE, _BEST_ALONE_WITH_MIN)
    return torch.cat((half_bytes(torch.stack((d, -dmin), 1)), _five_bits(codes)), 1)


def best_q8_0(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    d, _, codes = _signed(blocks, importance, 32, Integers(-128, 127), 128, _ONE, _BEST_ALONE)
    return torch.cat((half_bytes(d[:, None]), codes.to(torch.int8).view(torch.uint8)), 1)


def _affine(
    blocks: Tensor, importance: Tensor | None, size: int, largest: int, integers: Integers, effort: _Effort
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """d, dmin, scales, mins and codes in [0, largest] of sub-blocks of `size`, whose scales and mins are `integers`."""
    columns, levels = Columns.of(blocks, importance, size), Integers(0, largest)
    peaks = [largest, *_peaks(largest, effort.peaks, max(1.0, largest / 10))]
    scale, minimum = search_scale_and_min(columns, levels, peaks, signed=integers == _ONE)
    starts = range(integers.high, integers.high - effort.starts, -1)
    shape = (len(blocks), blocks.shape[1] // size)
    search = Search(integers, integers, starts, effort.rounds)
    first = fit(columns, levels, scale.view(shape), minimum.view(shape), search)

    def starts_of(part: Columns) -> list[tuple[Tensor, Tensor]]:
        # Where the mins may have either sign, weights of one sign may still be best with none.
        low, high = part.x.amin(0).clamp_(max=0), part.x.amax(0).clamp_(min=0)
        fine = [largest + step / 10 for step in range(-9, 10)]
        return [
            ((high - low) / largest, -low),
            search_scale_and_min(part, levels, fine, signed=integers == _ONE, zero=True),
        ]

    found = refine(columns, levels, first, starts_of, search)
    codes = found.nearest(columns, levels)[0].t().reshape(blocks.shape)
    return found.d, found.dmin, found.scales, found.mins, codes


def _signed(
    blocks: Tensor, importance: Tensor | None, size: int, levels: Levels, peak: int, integers: Integers, effort: _Effort
) -> tuple[Tensor, Tensor, Tensor]:
    """d, scales and codes of sub-blocks of `size` without a min, whose scales are `integers`."""
    columns, peaks = Columns.of(blocks, importance, size), _peaks(peak, effort.peaks, max(1.0, peak / 5))
    both = [-peak, *peaks, *(-value for value in peaks)]
    scale = search_scale(columns, levels, both, stored=integers == _ONE).view(len(blocks), -1)
    search = Search(integers, _NONE, (integers.low, integers.high)[: effort.starts], effort.rounds)

    def starts_of(part: Columns) -> list[tuple[Tensor, Tensor]]:
        largest = part.extreme()
        fine = [sign * (peak + step / 10) for step in range(-9, 10) for sign in (-1, 1)]
        scales = [largest / anchor for anchor in levels.anchors()]
        scales.append(search_scale(part, levels, fine, stored=integers == _ONE))
        return [(scale, torch.zeros_like(scale)) for scale in scales]

    found = refine(columns, levels, fit(columns, levels, scale, torch.zeros_like(scale), search), starts_of, search)
    codes = levels.codes(found.nearest(columns, levels)[0]).t().reshape(blocks.shape)
    return found.d, found.scales, codes


def _peaks(largest: int, count: int, reach: float) -> list[float]:
    """`count` real numbers around the largest level, more of them below: less clipping costs less than more."""
    return [largest + reach * (1.7 * index / (count - 1) - 1) for index in range(count)]


def _five_bits(codes: Tensor) -> Tensor:
    high = (codes > 15).to(torch.uint8)
    return torch.cat((pack_bits(high, 1, run=1), pack_bits(codes - 16 * high, 4, run=16)), 1)
