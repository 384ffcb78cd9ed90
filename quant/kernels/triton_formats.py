"""Block formats for Triton: which eight codes a thread decodes, and by which scale and minimum.

Each format is a function of (block, group): pointers to blocks, and which eight neighbouring weights of the block. It
returns (low, high, scale, minimum): the codes as bytes of two int32, and float32 with weight = (code - bias) * scale
- minimum. The arithmetic is that of `decode_*` in legacy.py, kquants.py and iq4.py, in the same order. No load is wider
than the alignment of its field in a row of blocks: 2 bytes for most formats.

Source: ggml-quants.c dequantize_row_* @ ggml 0.15.3, as in those modules.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

_NIBBLES = tl.constexpr(0x0F0F0F0F)
_PAIRS = tl.constexpr(0x03030303)
_BITS = tl.constexpr(0x01010101)
_SIGNS = tl.constexpr(0x80808080 - (1 << 32))


@dataclass(frozen=True)
class Format:
    """`bias` is None where codes stand for IQ4's levels."""

    bias: int | None = 0
    has_minimum: bool = False


@triton.jit
def _byte(pointer):
    return tl.load(pointer).to(tl.int32)


@triton.jit
def _half(pointer):
    return tl.load(pointer.to(tl.pointer_type(tl.float16))).to(tl.float32)


@triton.jit
def _word(pointer, ALIGN: tl.constexpr):
    """Four bytes."""
    if ALIGN >= 4:
        return tl.load(pointer.to(tl.pointer_type(tl.int32)))
    pair = pointer.to(tl.pointer_type(tl.uint16))
    return tl.load(pair).to(tl.int32) | (tl.load(pair + 1).to(tl.int32) << 16)


@triton.jit
def _words(pointer, ALIGN: tl.constexpr):
    """Eight bytes, as two words."""
    if ALIGN >= 8:
        both = tl.load(pointer.to(tl.pointer_type(tl.int64)))
        return both.to(tl.int32), (both >> 32).to(tl.int32)
    return _word(pointer, ALIGN), _word(pointer + 4, ALIGN)


@triton.jit
def _fields(pointer, shift, MASK: tl.constexpr, ALIGN: tl.constexpr):
    """The bits of MASK, `shift` bits up, of each of eight bytes."""
    low, high = _words(pointer, ALIGN)
    return (low >> shift) & MASK, (high >> shift) & MASK


@triton.jit
def _spread(bits):
    """Bits 0 to 7 -> bit 4 of the bytes of two words."""
    # The product puts bits 0 to 3 at the bottom of bytes 0 to 3: no two of its sixteen terms meet.
    low = ((bits & 15) * 0x00204081) & _BITS
    high = ((bits >> 4) * 0x00204081) & _BITS
    return low << 4, high << 4


@triton.jit
def q4_0(block, group):
    low, high = _fields(block + 2 + 8 * (group % 2), 4 * (group // 2), _NIBBLES, 2)
    return low, high, _half(block), 0.0


# Below, the product with -1: Triton negates as 0 - x, which loses the sign of a zero.
@triton.jit
def q4_1(block, group):
    low, high = _fields(block + 4 + 8 * (group % 2), 4 * (group // 2), _NIBBLES, 4)
    return low, high, _half(block), -1.0 * _half(block + 2)


@triton.jit
def q5_0(block, group):
    low, high = _fields(block + 6 + 8 * (group % 2), 4 * (group // 2), _NIBBLES, 2)
    low_bit, high_bit = _spread(_byte(block + 2 + group))
    return low | low_bit, high | high_bit, _half(block), 0.0


@triton.jit
def q5_1(block, group):
    low, high = _fields(block + 8 + 8 * (group % 2), 4 * (group // 2), _NIBBLES, 8)
    low_bit, high_bit = _spread(_byte(block + 4 + group))
    return low | low_bit, high | high_bit, _half(block), -1.0 * _half(block + 2)


@triton.jit
def q8_0(block, group):
    low, high = _words(block + 2 + 8 * group, 2)
    return low ^ _SIGNS, high ^ _SIGNS, _half(block), 0.0


@triton.jit
def q2_k(block, group):
    low, high = _fields(block + 16 + 32 * (group // 16) + 8 * (group % 4), 2 * (group // 4 % 4), _PAIRS, 4)
    scale = _byte(block + group // 2)
    return low, high, _half(block + 80) * (scale & 15).to(tl.float32), _half(block + 82) * (scale >> 4).to(tl.float32)


@triton.jit
def q3_k(block, group):
    low, high = _fields(block + 32 + 32 * (group // 16) + 8 * (group % 4), 2 * (group // 4 % 4), _PAIRS, 2)
    low_bit, high_bit = _fields(block + 8 * (group % 4), group // 4, _BITS, 2)
    sub = group // 2
    scale = (_byte(block + 96 + sub % 8) >> (4 * (sub // 8))) & 15
    scale |= ((_byte(block + 104 + sub % 4) >> (2 * (sub // 4))) & 3) << 4
    return low | low_bit << 2, high | high_bit << 2, _half(block + 108) * (scale.to(tl.int32) - 32).to(tl.float32), 0.0


@triton.jit
def _scales(block, sub):
    """Scale and minimum of sub-blocks of Q4_K and Q5_K, as `kquants._unpack_scales`."""
    shift = 8 * (sub % 4)
    first, second, third = _word(block + 4, 4) >> shift, _word(block + 8, 4) >> shift, _word(block + 12, 4) >> shift
    scale = tl.where(sub < 4, first & 63, (third & 15) | ((first >> 2) & 48))
    minimum = tl.where(sub < 4, second & 63, ((third >> 4) & 15) | ((second >> 2) & 48))
    return _half(block) * scale.to(tl.float32), _half(block + 2) * minimum.to(tl.float32)


@triton.jit
def q4_k(block, group):
    scale, minimum = _scales(block, group // 4)
    low, high = _fields(block + 16 + 32 * (group // 8) + 8 * (group % 4), group & 4, _NIBBLES, 8)
    return low, high, scale, minimum


@triton.jit
def q5_k(block, group):
    scale, minimum = _scales(block, group // 4)
    low, high = _fields(block + 48 + 32 * (group // 8) + 8 * (group % 4), group & 4, _NIBBLES, 8)
    low_bit, high_bit = _fields(block + 16 + 8 * (group % 4), group // 4, _BITS, 8)
    return low | low_bit << 4, high | high_bit << 4, scale, minimum


@triton.jit
def q6_k(block, group):
    half, part = group // 16, group % 16
    low, high = _fields(block + 64 * half + 8 * (part % 8), 4 * (part // 8), _NIBBLES, 2)
    low_bits, high_bits = _fields(block + 128 + 32 * half + 8 * (part % 4), 2 * (part // 4), _PAIRS, 2)
    scale = _byte(block + 192 + group // 2).to(tl.int8).to(tl.float32)
    return low | low_bits << 4, high | high_bits << 4, _half(block + 208) * scale, 0.0


@triton.jit
def iq4_xs(block, group):
    sub = group // 4
    scale = (_word(block + 4, 4) >> (4 * sub)) & 15
    scale |= ((_word(block, 4) >> (16 + 2 * sub)) & 3) << 4
    low, high = _fields(block + 8 + 16 * sub + 8 * (group % 2), 2 * (group & 2), _NIBBLES, 8)
    return low, high, _half(block) * (scale.to(tl.int32) - 32).to(tl.float32), 0.0


@triton.jit
def read(block, group, FORMAT: tl.constexpr):
    """By name, as Triton 3.2 launches no kernel that has a function among its constants."""
    if FORMAT == "Q4_0":
        return q4_0(block, group)
    elif FORMAT == "Q4_1":
        return q4_1(block, group)
    elif FORMAT == "Q5_0":
        return q5_0(block, group)
    elif FORMAT == "Q5_1":
        return q5_1(block, group)
    elif FORMAT == "Q8_0":
        return q8_0(block, group)
    elif FORMAT == "Q2_K":
        return q2_k(block, group)
    elif FORMAT == "Q3_K":
        return q3_k(block, group)
    elif FORMAT == "Q4_K":
        return q4_k(block, group)
    elif FORMAT == "Q5_K":
        return q5_k(block, group)
    elif FORMAT == "Q6_K":
        return q6_k(block, group)
    elif FORMAT == "IQ4_NL":
        return q4_0(block, group)
    elif FORMAT == "IQ4_XS":
        return iq4_xs(block, group)


FORMATS = {
    "Q4_0": Format(bias=8),
    "Q4_1": Format(has_minimum=True),
    "Q5_0": Format(bias=16),
    "Q5_1": Format(has_minimum=True),
    "Q8_0": Format(bias=128),
    "Q2_K": Format(has_minimum=True),
    "Q3_K": Format(bias=4),
    "Q4_K": Format(has_minimum=True),
    "Q5_K": Format(has_minimum=True),
    "Q6_K": Format(bias=32),
    "IQ4_NL": Format(bias=None),
    "IQ4_XS": Format(bias=None),
}
