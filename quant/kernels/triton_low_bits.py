"""The formats for Triton of one to four bits without sub-block scales of their own: Q1, Q2_0, TQ, MXFP4 and NVFP4.

The functions are those of triton_formats.py. Codes that are not stored as integers are made from them for four weights
at once, in the bytes of a word.

Source: ggml-quants.c dequantize_row_* @ ggml 0.20.2, as in quant/formats/{low_bits,ternary,microscaling}.py.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from .triton_loads import BITS, PAIRS, SIGNS, load_byte, load_half, load_pair, load_shifted_words, load_word, spread

_BYTES = tl.constexpr(0x00FF00FF)
_MAGNITUDES = tl.constexpr(0x07070707)


@triton.jit
def q1_0(block, group, FIELD: tl.constexpr):
    low, high = spread(load_byte(block + 2 + group))
    return low << 1, high << 1, load_half(block), 0.0


@triton.jit
def q2_0(block, group, FIELD: tl.constexpr):
    pair = load_pair(block + 2 + 2 * group)
    low, high = pair & 255, pair >> 8
    # Two bits of a byte move to each byte of a word.
    low, high = low | (low << 12), high | (high << 12)
    return low | (low << 6), high | (high << 6), load_half(block), 0.0


@triton.jit
def _power_of_3(exponent):
    """Return 3 to the power of 0 to 4."""
    return tl.where(exponent == 4, 81, (0x1B090301 >> (8 * exponent)) & 255)


@triton.jit
def _digits(word, power):
    """Return a digit of base 3 of each byte, as `ternary._unpack_digits` reads them: a fraction of 256, times power."""
    even, odd = ((word & _BYTES) * power) & _BYTES, (((word >> 8) & _BYTES) * power) & _BYTES
    return ((even * 3) >> 8) & (_BYTES & PAIRS) | ((odd * 3) & (PAIRS & ~_BYTES))


@triton.jit
def tq1_0(block, group, FIELD: tl.constexpr):
    # Five digits of 32 bytes are 20 groups, five digits of 16 bytes are 10, and four digits of 4 bytes are 2. In the
    # last ones, a group has two digits of the same bytes.
    last = group >= 30
    place = tl.where(group < 20, 8 * (group % 4), tl.where(last, 48, 32 + 8 * (group % 2)))
    digit = tl.where(group < 20, group // 4, tl.where(last, 2 * (group % 2), (group - 20) // 2))
    low, high = load_word(block + place, 2), load_word(block + place + tl.where(last, 0, 4), 2)
    low, high = _digits(low, _power_of_3(digit)), _digits(high, _power_of_3(digit + last.to(tl.uint32)))
    return low, high, load_half(block + 52), 0.0


@triton.jit
def tq2_0(block, group, FIELD: tl.constexpr):
    low, high = load_shifted_words(block + 8 * group, 2 * FIELD, 2)
    return low, high, load_half(block + 64), 0.0


@triton.jit
def _e2m1(word):
    """Return 128 plus the entry of `microscaling.KVALUES` for the lowest four bits of each byte."""
    # Magnitudes from 4 on, whose third bit is set, exceed their code by 0, 1, 2 or 5.
    more = word & (((word >> 2) & BITS) * 3)
    magnitude = (word & _MAGNITUDES) + more + ((more & (more >> 1) & BITS) << 1)
    minus = (word >> 3) & BITS
    return (magnitude ^ SIGNS ^ (minus * 255)) + minus


@triton.jit
def mxfp4(block, group, FIELD: tl.constexpr):
    low, high = load_shifted_words(block + 1 + 8 * group, 4 * FIELD, 1)
    e = load_byte(block)
    scale = tl.where(e < 2, (e + 1) << 21, (e - 1) << 23).to(tl.float32, bitcast=True)
    return _e2m1(low), _e2m1(high), scale, 0.0


@triton.jit
def nvfp4(block, group, FIELD: tl.constexpr):
    low, high = load_shifted_words(block + 4 + 8 * group, 4 * FIELD, 4)
    d = load_byte(block + group)
    # Float16 has 7 more bits of mantissa than e4m3, and its exponent has a bias of 15 instead of 7.
    scale = ((d & 127) << 7).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 128.0
    return _e2m1(low), _e2m1(high), tl.where(d == 127, 0.0, scale), 0.0


@triton.jit
def read_low_bits(block, group, FIELD: tl.constexpr, FORMAT: tl.constexpr):
    """Call the function of a format by its name, as `triton_formats.read` does."""
    if FORMAT == "TQ1_0":
        return tq1_0(block, group, FIELD)
    elif FORMAT == "TQ2_0":
        return tq2_0(block, group, FIELD)
    elif FORMAT == "MXFP4":
        return mxfp4(block, group, FIELD)
    elif FORMAT == "NVFP4":
        return nvfp4(block, group, FIELD)
    elif FORMAT == "Q1_0":
        return q1_0(block, group, FIELD)
    elif FORMAT == "Q2_0":
        return q2_0(block, group, FIELD)
