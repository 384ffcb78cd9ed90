"""Block formats for Triton: which codes a thread decodes, and by which scales and minima.

A thread takes an octet, eight neighbouring bytes of a block's codes, and decodes every code in it. Where a byte holds
two codes, ggml means weights SPAN octets apart: the octet's are two rows of eight neighbours. So no byte is read twice,
and which bits belong to a row is known when the kernel is compiled.

Each format is a function of (block, octet, ROW): pointers to blocks, and which octet of the block. It returns (low,
high, scale, minimum): the codes in the lowest bits of the bytes of two words, anything above them, and float32 with
weight = (code - bias) * scale - minimum. The arithmetic is that of `dequantize_*` in quant/formats, in the same order.
No load is wider than the alignment of its field in a row of blocks: 2 bytes for most formats.

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
class CodeLayout:
    """How codes lie, and what they stand for."""

    bits: int
    rows: int = 2
    span: int = 4
    bias: int | None = 0
    """None: codes stand for IQ4's levels."""
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
def _fields(pointer, shift, ALIGN: tl.constexpr):
    """Eight bytes as two words, shifted down."""
    low, high = _words(pointer, ALIGN)
    return low >> shift, high >> shift


@triton.jit
def _spread(bits):
    """Bits 0 to 7 -> bit 4 of the bytes of two words."""
    # The product puts bits 0 to 3 at the bottom of bytes 0 to 3: no two of its sixteen terms meet.
    low = ((bits & 15) * 0x00204081) & _BITS
    high = ((bits >> 4) * 0x00204081) & _BITS
    return low << 4, high << 4


@triton.jit
def q4_0(block, octet, ROW: tl.constexpr):
    low, high = _fields(block + 2 + 8 * octet, 4 * ROW, 2)
    return low, high, _half(block), 0.0


# Below, the product with -1: Triton negates as 0 - x, which loses the sign of a zero.
@triton.jit
def q4_1(block, octet, ROW: tl.constexpr):
    low, high = _fields(block + 4 + 8 * octet, 4 * ROW, 4)
    return low, high, _half(block), -1.0 * _half(block + 2)


@triton.jit
def q5_0(block, octet, ROW: tl.constexpr):
    low, high = _fields(block + 6 + 8 * octet, 4 * ROW, 2)
    low_bit, high_bit = _spread((_word(block + 2, 2) >> (8 * octet) >> (16 * ROW)) & 255)
    return (low & _NIBBLES) | low_bit, (high & _NIBBLES) | high_bit, _half(block), 0.0


@triton.jit
def q5_1(block, octet, ROW: tl.constexpr):
    low, high = _fields(block + 8 + 8 * octet, 4 * ROW, 8)
    low_bit, high_bit = _spread((_word(block + 4, 4) >> (8 * octet) >> (16 * ROW)) & 255)
    return (low & _NIBBLES) | low_bit, (high & _NIBBLES) | high_bit, _half(block), -1.0 * _half(block + 2)


@triton.jit
def q8_0(block, octet, ROW: tl.constexpr):
    low, high = _words(block + 2 + 8 * octet, 2)
    return low ^ _SIGNS, high ^ _SIGNS, _half(block), 0.0


@triton.jit
def q2_k(block, octet, ROW: tl.constexpr):
    low, high = _fields(block + 16 + 8 * octet, 2 * ROW, 4)
    # Sub-block 8 half + 2 row + part // 2.
    scale = _word(block + 8 * (octet // 4) + 4 * (ROW // 2), 4) >> (8 * (octet % 4 // 2)) >> (16 * (ROW % 2))
    scale, minimum = (scale & 15).to(tl.float32), ((scale >> 4) & 15).to(tl.float32)
    return low, high, _half(block + 80) * scale, _half(block + 82) * minimum


@triton.jit
def q3_k(block, octet, ROW: tl.constexpr):
    half, part = octet // 4, octet % 4
    low, high = _fields(block + 32 + 8 * octet, 2 * ROW, 2)
    low_bit, high_bit = _fields(block + 8 * part, 4 * half, 2)
    low_bit, high_bit = (low_bit >> ROW) & _BITS, (high_bit >> ROW) & _BITS
    # Sub-block 8 half + 2 row + part // 2.
    down = 8 * (part // 2) + 4 * half
    scale = (_word(block + 96 + 4 * (ROW // 2), 2) >> down >> (16 * (ROW % 2))) & 15
    scale |= ((_word(block + 104, 2) >> down >> (16 * (ROW % 2) + 2 * (ROW // 2))) & 3) << 4
    scale = _half(block + 108) * (scale.to(tl.int32) - 32).to(tl.float32)
    return (low & _PAIRS) | low_bit << 2, (high & _PAIRS) | high_bit << 2, scale, 0.0


@triton.jit
def _scales(block, octet, ROW: tl.constexpr):
    """Scale and minimum of the two sub-blocks of an octet of Q4_K and Q5_K, as `kquants._unpack_scales`."""
    shift = 16 * (octet // 4 % 2)
    first, second, third = _word(block + 4, 4) >> shift, _word(block + 8, 4) >> shift, _word(block + 12, 4) >> shift
    # The four of them in the bytes of one word: two scales, two minima.
    near = (first & 0xFFFF) | (second << 16)
    far = (third & 0x0F0F) | ((third & 0xF0F0) << 12) | ((near >> 2) & 0x30303030)
    both = tl.where(octet < 8, near & 0x3F3F3F3F, far)
    scale, minimum = (both >> (8 * ROW)) & 255, (both >> (8 * ROW) >> 16) & 255
    return _half(block) * scale.to(tl.float32), _half(block + 2) * minimum.to(tl.float32)


@triton.jit
def q4_k(block, octet, ROW: tl.constexpr):
    scale, minimum = _scales(block, octet, ROW)
    low, high = _fields(block + 16 + 8 * octet, 4 * ROW, 8)
    return low, high, scale, minimum


@triton.jit
def q5_k(block, octet, ROW: tl.constexpr):
    scale, minimum = _scales(block, octet, ROW)
    low, high = _fields(block + 48 + 8 * octet, 4 * ROW, 8)
    low_bit, high_bit = _fields(block + 16 + 8 * (octet % 4), 2 * (octet // 4), 8)
    low_bit, high_bit = (low_bit >> ROW) & _BITS, (high_bit >> ROW) & _BITS
    return (low & _NIBBLES) | low_bit << 4, (high & _NIBBLES) | high_bit << 4, scale, minimum


@triton.jit
def q6_k(block, octet, ROW: tl.constexpr):
    half, part = octet // 4, octet % 4
    low, high = _fields(block + 64 * half + 8 * part + 32 * (ROW % 2), 4 * (ROW // 2), 2)
    low_bits, high_bits = _fields(block + 128 + 8 * octet, 2 * ROW, 2)
    low, high = (low & _NIBBLES) | (low_bits & _PAIRS) << 4, (high & _NIBBLES) | (high_bits & _PAIRS) << 4
    scale = _byte(block + 192 + 8 * half + part // 2 + 2 * ROW).to(tl.int8).to(tl.float32)
    return low, high, _half(block + 208) * scale, 0.0


@triton.jit
def iq4_xs(block, octet, ROW: tl.constexpr):
    sub = octet // 2
    scale = (_word(block + 4, 4) >> (4 * sub)) & 15
    scale |= ((_word(block, 4) >> (16 + 2 * sub)) & 3) << 4
    low, high = _fields(block + 8 + 8 * octet, 4 * ROW, 8)
    return low, high, _half(block) * (scale.to(tl.int32) - 32).to(tl.float32), 0.0


@triton.jit
def read(block, octet, ROW: tl.constexpr, FORMAT: tl.constexpr):
    """By name, as Triton 3.2 launches no kernel that has a function among its constants."""
    if FORMAT == "Q4_0":
        return q4_0(block, octet, ROW)
    elif FORMAT == "Q4_1":
        return q4_1(block, octet, ROW)
    elif FORMAT == "Q5_0":
        return q5_0(block, octet, ROW)
    elif FORMAT == "Q5_1":
        return q5_1(block, octet, ROW)
    elif FORMAT == "Q8_0":
        return q8_0(block, octet, ROW)
    elif FORMAT == "Q2_K":
        return q2_k(block, octet, ROW)
    elif FORMAT == "Q3_K":
        return q3_k(block, octet, ROW)
    elif FORMAT == "Q4_K":
        return q4_k(block, octet, ROW)
    elif FORMAT == "Q5_K":
        return q5_k(block, octet, ROW)
    elif FORMAT == "Q6_K":
        return q6_k(block, octet, ROW)
    elif FORMAT == "IQ4_NL":
        return q4_0(block, octet, ROW)
    elif FORMAT == "IQ4_XS":
        return iq4_xs(block, octet, ROW)


FORMATS = {
    "Q4_0": CodeLayout(4, span=2, bias=8),
    "Q4_1": CodeLayout(4, span=2, has_minimum=True),
    "Q5_0": CodeLayout(5, span=2, bias=16),
    "Q5_1": CodeLayout(5, span=2, has_minimum=True),
    "Q8_0": CodeLayout(8, rows=1, bias=128),
    "Q2_K": CodeLayout(2, rows=4, has_minimum=True),
    "Q3_K": CodeLayout(3, rows=4, bias=4),
    "Q4_K": CodeLayout(4, has_minimum=True),
    "Q5_K": CodeLayout(5, has_minimum=True),
    "Q6_K": CodeLayout(6, rows=4, bias=32),
    "IQ4_NL": CodeLayout(4, span=2, bias=None),
    "IQ4_XS": CodeLayout(4, span=2, bias=None),
}
