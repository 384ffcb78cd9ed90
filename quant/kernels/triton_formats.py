"""The block formats for Triton: which codes a thread reads, and the scale and min that belong to them.

A thread takes a group of eight neighboring bytes of a block's codes and dequantizes all codes in it. So no byte is read
twice. A byte has one, two or four bit fields (FIELDS), each of which is a code or some bits of one. One bit field of
all eight bytes holds the codes of eight neighboring weights. The next bit field holds those of the weights SPAN groups,
or 8 * SPAN weights, further on. Which bits to take is known when the kernel is compiled.

IQ1, IQ2 and IQ3 (triton_grids.py) store the numbers of rows in a grid instead of codes. Their thread takes a group of
two rows, each of which stands for a bit field.

Each format is a function of (block, group, FIELD): pointers to blocks, the number of a group in its block, and the
number of a bit field. It returns (low, high, scale, minimum):

- low and high are two words with a code in the lowest bits of each byte. The other bits may hold anything.
- scale and minimum are float32, with weight = (code - bias) * scale - minimum.

The arithmetic is that of `unpack_*` in quant/formats, in the same order. No load is wider than the alignment of its
field within a row of blocks, which is 2 bytes for most formats.

Source: ggml-quants.c dequantize_row_* @ ggml 0.15.3, as in those modules.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from .triton_grids import read_grid
from .triton_loads import BITS, PAIRS, SIGNS, load_byte, load_half, load_shifted_words, load_word, load_words, spread
from .triton_low_bits import read_low_bits

_NIBBLES = tl.constexpr(0x0F0F0F0F)


@dataclass(frozen=True)
class CodeLayout:
    """The places of the codes of a format, and what they stand for."""

    bits: int
    """The bits of a code."""
    fields: int = 2
    """The bit fields of a byte."""
    span: int = 4
    """The groups between the weights of one bit field and those of the next."""
    bias: int | None = 0
    """What is subtracted from a code; None if codes are indices into IQ4's codebook."""
    has_minimum: bool = False
    grid_steps: int = 0
    """The difference between the codes of neighboring integers in the grid; 0 for a type without a grid."""


@triton.jit
def q4_0(block, group, FIELD: tl.constexpr):
    low, high = load_shifted_words(block + 2 + 8 * group, 4 * FIELD, 2)
    return low, high, load_half(block), 0.0


# A product with -1 is used below because Triton negates x as 0 - x, which loses the sign of a zero.
@triton.jit
def q4_1(block, group, FIELD: tl.constexpr):
    low, high = load_shifted_words(block + 4 + 8 * group, 4 * FIELD, 4)
    return low, high, load_half(block), -1.0 * load_half(block + 2)


@triton.jit
def q5_0(block, group, FIELD: tl.constexpr):
    low, high = load_shifted_words(block + 6 + 8 * group, 4 * FIELD, 2)
    low_bit, high_bit = spread(load_word(block + 2, 2) >> (8 * group) >> (16 * FIELD))
    return (low & _NIBBLES) | low_bit << 4, (high & _NIBBLES) | high_bit << 4, load_half(block), 0.0


@triton.jit
def q5_1(block, group, FIELD: tl.constexpr):
    low, high = load_shifted_words(block + 8 + 8 * group, 4 * FIELD, 8)
    low_bit, high_bit = spread(load_word(block + 4, 4) >> (8 * group) >> (16 * FIELD))
    low, high = (low & _NIBBLES) | low_bit << 4, (high & _NIBBLES) | high_bit << 4
    return low, high, load_half(block), -1.0 * load_half(block + 2)


@triton.jit
def q8_0(block, group, FIELD: tl.constexpr):
    low, high = load_words(block + 2 + 8 * group, 2)
    return low ^ SIGNS, high ^ SIGNS, load_half(block), 0.0


@triton.jit
def q2_k(block, group, FIELD: tl.constexpr):
    low, high = load_shifted_words(block + 16 + 8 * group, 2 * FIELD, 4)
    # The sub-block is 8 * (group // 4) + 2 * FIELD + (group % 4) // 2.
    scale = load_word(block + 8 * (group // 4) + 4 * (FIELD // 2), 4) >> (8 * (group % 4 // 2)) >> (16 * (FIELD % 2))
    scale, minimum = (scale & 15).to(tl.float32), ((scale >> 4) & 15).to(tl.float32)
    return low, high, load_half(block + 80) * scale, load_half(block + 82) * minimum


@triton.jit
def q3_k(block, group, FIELD: tl.constexpr):
    half, part = group // 4, group % 4
    low, high = load_shifted_words(block + 32 + 8 * group, 2 * FIELD, 2)
    low_bit, high_bit = load_shifted_words(block + 8 * part, 4 * half, 2)
    low_bit, high_bit = (low_bit >> FIELD) & BITS, (high_bit >> FIELD) & BITS
    # The sub-block is 8 * (group // 4) + 2 * FIELD + (group % 4) // 2.
    down = 8 * (part // 2) + 4 * half
    scale = (load_word(block + 96 + 4 * (FIELD // 2), 2) >> down >> (16 * (FIELD % 2))) & 15
    scale |= ((load_word(block + 104, 2) >> down >> (16 * (FIELD % 2) + 2 * (FIELD // 2))) & 3) << 4
    scale = load_half(block + 108) * (scale.to(tl.int32) - 32).to(tl.float32)
    return (low & PAIRS) | low_bit << 2, (high & PAIRS) | high_bit << 2, scale, 0.0


@triton.jit
def _scales(block, group, FIELD: tl.constexpr):
    """Return the scale and min for a bit field of a group of Q4_K or Q5_K, as `kquants._scales_and_mins` reads them."""
    shift = 16 * (group // 4 % 2)
    first, second = load_word(block + 4, 4) >> shift, load_word(block + 8, 4) >> shift
    third = load_word(block + 12, 4) >> shift
    # The bytes of one word become the two scales and the two mins of the group.
    near = (first & 0xFFFF) | (second << 16)
    far = (third & 0x0F0F) | ((third & 0xF0F0) << 12) | ((near >> 2) & 0x30303030)
    both = tl.where(group < 8, near & 0x3F3F3F3F, far)
    scale, minimum = (both >> (8 * FIELD)) & 255, (both >> (8 * FIELD) >> 16) & 255
    return load_half(block) * scale.to(tl.float32), load_half(block + 2) * minimum.to(tl.float32)


@triton.jit
def q4_k(block, group, FIELD: tl.constexpr):
    scale, minimum = _scales(block, group, FIELD)
    low, high = load_shifted_words(block + 16 + 8 * group, 4 * FIELD, 8)
    return low, high, scale, minimum


@triton.jit
def q5_k(block, group, FIELD: tl.constexpr):
    scale, minimum = _scales(block, group, FIELD)
    low, high = load_shifted_words(block + 48 + 8 * group, 4 * FIELD, 8)
    low_bit, high_bit = load_shifted_words(block + 16 + 8 * (group % 4), 2 * (group // 4), 8)
    low_bit, high_bit = (low_bit >> FIELD) & BITS, (high_bit >> FIELD) & BITS
    return (low & _NIBBLES) | low_bit << 4, (high & _NIBBLES) | high_bit << 4, scale, minimum


@triton.jit
def q6_k(block, group, FIELD: tl.constexpr):
    half, part = group // 4, group % 4
    low, high = load_shifted_words(block + 64 * half + 8 * part + 32 * (FIELD % 2), 4 * (FIELD // 2), 2)
    low_bits, high_bits = load_shifted_words(block + 128 + 8 * group, 2 * FIELD, 2)
    low, high = (low & _NIBBLES) | (low_bits & PAIRS) << 4, (high & _NIBBLES) | (high_bits & PAIRS) << 4
    scale = load_byte(block + 192 + 8 * half + part // 2 + 2 * FIELD).to(tl.int8).to(tl.float32)
    return low, high, load_half(block + 208) * scale, 0.0


@triton.jit
def iq4_xs(block, group, FIELD: tl.constexpr):
    sub = group // 2
    scale = (load_word(block + 4, 4) >> (4 * sub)) & 15
    scale |= ((load_word(block, 4) >> (16 + 2 * sub)) & 3) << 4
    low, high = load_shifted_words(block + 8 + 8 * group, 4 * FIELD, 8)
    return low, high, load_half(block) * (scale.to(tl.int32) - 32).to(tl.float32), 0.0


@triton.jit
def read(block, group, grid, FIELD: tl.constexpr, FORMAT: tl.constexpr):
    """Call the function of a format by its name; Triton 3.2 cannot launch a kernel with a function as a constant."""
    if FORMAT == "Q4_0":
        return q4_0(block, group, FIELD)
    elif FORMAT == "Q4_1":
        return q4_1(block, group, FIELD)
    elif FORMAT == "Q5_0":
        return q5_0(block, group, FIELD)
    elif FORMAT == "Q5_1":
        return q5_1(block, group, FIELD)
    elif FORMAT == "Q8_0":
        return q8_0(block, group, FIELD)
    elif FORMAT == "Q2_K":
        return q2_k(block, group, FIELD)
    elif FORMAT == "Q3_K":
        return q3_k(block, group, FIELD)
    elif FORMAT == "Q4_K":
        return q4_k(block, group, FIELD)
    elif FORMAT == "Q5_K":
        return q5_k(block, group, FIELD)
    elif FORMAT == "Q6_K":
        return q6_k(block, group, FIELD)
    elif FORMAT == "IQ4_NL":
        return q4_0(block, group, FIELD)
    elif FORMAT == "IQ4_XS":
        return iq4_xs(block, group, FIELD)
    elif grid is None:
        return read_low_bits(block, group, FIELD, FORMAT)
    else:
        return read_grid(block, group, grid, FIELD, FORMAT)


FORMATS = {
    "Q4_0": CodeLayout(4, span=2, bias=8),
    "Q4_1": CodeLayout(4, span=2, has_minimum=True),
    "Q5_0": CodeLayout(5, span=2, bias=16),
    "Q5_1": CodeLayout(5, span=2, has_minimum=True),
    "Q8_0": CodeLayout(8, fields=1, bias=128),
    "Q2_K": CodeLayout(2, fields=4, has_minimum=True),
    "Q3_K": CodeLayout(3, fields=4, bias=4),
    "Q4_K": CodeLayout(4, has_minimum=True),
    "Q5_K": CodeLayout(5, has_minimum=True),
    "Q6_K": CodeLayout(6, fields=4, bias=32),
    "IQ4_NL": CodeLayout(4, span=2, bias=None),
    "IQ4_XS": CodeLayout(4, span=2, bias=None),
    **dict.fromkeys(("IQ1_S", "IQ1_M"), CodeLayout(8, span=2, bias=128, grid_steps=8)),
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), CodeLayout(8, span=2, bias=128, grid_steps=1)),
    "TQ1_0": CodeLayout(2, fields=1, bias=1),
    "TQ2_0": CodeLayout(2, fields=4, bias=1),
    "MXFP4": CodeLayout(8, span=2, bias=128),
    "NVFP4": CodeLayout(8, span=1, bias=128),
    "Q1_0": CodeLayout(2, fields=1, bias=1),
    "Q2_0": CodeLayout(2, fields=1, bias=1),
}
