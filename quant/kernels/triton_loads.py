"""Loads of a block's bytes for Triton, as floats and as words of four bytes, on which one instruction works at once."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

BITS = tl.constexpr(0x01010101)
PAIRS = tl.constexpr(0x03030303)
SIGNS = tl.constexpr(0x80808080 - (1 << 32))


@triton.jit
def load_byte(pointer):
    return tl.load(pointer).to(tl.int32)


@triton.jit
def load_pair(pointer):
    """Load two bytes as the lower half of a word."""
    return tl.load(pointer.to(tl.pointer_type(tl.uint16))).to(tl.int32)


@triton.jit
def load_half(pointer):
    return tl.load(pointer.to(tl.pointer_type(tl.float16))).to(tl.float32)


@triton.jit
def load_word(pointer, ALIGN: tl.constexpr):
    """Load four bytes as a word."""
    if ALIGN >= 4:
        return tl.load(pointer.to(tl.pointer_type(tl.int32)))
    if ALIGN == 1:
        low, high = load_byte(pointer) | (load_byte(pointer + 1) << 8), load_byte(pointer + 2)
        return low | (high << 16) | (load_byte(pointer + 3) << 24)
    return load_pair(pointer) | (load_pair(pointer + 2) << 16)


@triton.jit
def load_words(pointer, ALIGN: tl.constexpr):
    """Load eight bytes as two words."""
    if ALIGN >= 8:
        both = tl.load(pointer.to(tl.pointer_type(tl.int64)))
        return both.to(tl.int32), (both >> 32).to(tl.int32)
    return load_word(pointer, ALIGN), load_word(pointer + 4, ALIGN)


@triton.jit
def load_shifted_words(pointer, shift, ALIGN: tl.constexpr):
    """Load eight bytes as two words, each shifted right."""
    low, high = load_words(pointer, ALIGN)
    return low >> shift, high >> shift


@triton.jit
def spread(bits):
    """Move the bits 0 to 7 to the lowest bit of each byte of two words."""
    # The product copies bits 0 to 3 to the lowest bits of bytes 0 to 3. Its sixteen terms fall on different bits.
    low = ((bits & 15) * 0x00204081) & BITS
    high = (((bits >> 4) & 15) * 0x00204081) & BITS
    return low, high
