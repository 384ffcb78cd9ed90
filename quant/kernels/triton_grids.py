"""The formats for Triton whose codes are rows of a grid: IQ1, IQ2 and IQ3.

A group is two of the four rows of eight weights in a sub-block: the first and third, or the second and fourth. A bit
field is one of them. Rows come from a table of codes, `grid_codes`, which is small enough for the cache of a
multiprocessor. Signs are bits, with which a code moves to the other side of the bias by integer arithmetic.

The functions are those of triton_formats.py with one more argument, the table. Weights are (code - 128) * scale.
Float32 holds every product exactly, so that the order of the factors does not matter.

Source: ggml-quants.c dequantize_row_iq* @ ggml 0.15.3, as in quant/formats/iquants.py.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import cached_on_device
from ..formats import iquants
from .triton_loads import BITS, load_byte, load_half, load_pair, load_word, load_words, spread


@cached_on_device
def grid_codes(name: str, steps: int, device: torch.device) -> Tensor:
    """Return a type's grid as codes, 128 plus `steps` times each of its integers: uint8 (rows, 8 or 4)."""
    return (128 + steps * iquants.grid(name)).to(torch.uint8).to(device)


@triton.jit
def _odd(nibble):
    """Return the odd number 2 n + 1 as float32 from n, the bits 1 to 4."""
    return ((nibble & 30) | 1).to(tl.float32)


@triton.jit
def _signed(low, high, signs):
    """Subtract from the bias what a code exceeds it by, where its bit of `signs` is set."""
    # The code becomes 256 - code, which is 1 more than all its bits inverted.
    low_bit, high_bit = spread(signs)
    return (low ^ (low_bit * 255)) + low_bit, (high ^ (high_bit * 255)) + high_bit


@triton.jit
def _even(signs):
    """Return eight signs for the seven lowest bits: the eighth makes the number of minus signs even."""
    signs &= 127
    # Bit i of 0x6996 is set where i has an odd number of bits.
    return signs | (((0x6996 << 7) >> ((signs ^ (signs >> 4)) & 15)) & 128)


@triton.jit
def _shifted_by_eighths(low, high, minus):
    """Move the codes of IQ1, which are eighths of its grid's integers, by one eighth down or up."""
    step = tl.where(minus != 0, -1 * BITS, BITS)
    return low + step, high + step


@triton.jit
def iq1_s(block, group, grid, FIELD: tl.constexpr):
    sub, part = group // 2, group % 2
    word = load_pair(block + 34 + 2 * sub)
    row = load_byte(block + 2 + 4 * sub + part + 2 * FIELD)
    row |= ((word << 8) >> (3 * part) >> (6 * FIELD)) & 0x700
    low, high = load_words(grid + 8 * row, 8)
    low, high = _shifted_by_eighths(low, high, word & 0x8000)
    return low, high, load_half(block) * 0.125 * _odd((word >> 11) & 14), 0.0


@triton.jit
def iq1_m(block, group, grid, FIELD: tl.constexpr):
    sub, part = group // 2, group % 2
    bits = load_pair(block + 32 + 2 * sub) >> (4 * part) >> (8 * FIELD)
    row = load_byte(block + 4 * sub + part + 2 * FIELD) | ((bits & 7) << 8)
    low, high = load_words(grid + 8 * row, 8)
    low, high = _shifted_by_eighths(low, high, bits & 8)
    scale = ((load_pair(block + 48 + 2 * (sub // 2)) << 1) >> (6 * (sub % 2)) >> (3 * FIELD)) & 14
    # The highest four bits of each 16-bit word are four bits of the factor.
    first, second = load_words(block + 48, 8)
    d = ((first >> 12) & 15) | ((first >> 24) & 0xF0) | ((second >> 4) & 0xF00) | ((second >> 16) & 0xF000)
    d = d.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high, d * 0.125 * _odd(scale), 0.0


@triton.jit
def iq2_xxs(block, group, grid, FIELD: tl.constexpr):
    sub, part = group // 2, group % 2
    word = load_word(block + 6 + 8 * sub, 2)
    row = load_byte(block + 2 + 8 * sub + part + 2 * FIELD)
    low, high = load_words(grid + 8 * row, 8)
    low, high = _signed(low, high, _even(word >> (7 * part) >> (14 * FIELD)))
    return low, high, load_half(block) * 0.125 * _odd(word >> 27), 0.0


@triton.jit
def iq2_xs(block, group, grid, FIELD: tl.constexpr):
    sub, part = group // 2, group % 2
    pair = load_pair(block + 2 + 8 * sub + 2 * part + 4 * FIELD)
    low, high = load_words(grid + 8 * (pair & 511), 8)
    low, high = _signed(low, high, _even(pair >> 9))
    scale = (load_byte(block + 66 + sub) << 1) >> (4 * FIELD)
    return low, high, load_half(block) * 0.125 * _odd(scale), 0.0


@triton.jit
def iq2_s(block, group, grid, FIELD: tl.constexpr):
    sub, part = group // 2, group % 2
    row = load_byte(block + 2 + 4 * sub + part + 2 * FIELD)
    row |= ((load_byte(block + 66 + sub) << 8) >> (2 * part) >> (4 * FIELD)) & 0x300
    low, high = load_words(grid + 8 * row, 8)
    low, high = _signed(low, high, load_pair(block + 34 + 4 * sub + 2 * FIELD) >> (8 * part))
    scale = (load_byte(block + 74 + sub) << 1) >> (4 * FIELD)
    return low, high, load_half(block) * 0.125 * _odd(scale), 0.0


@triton.jit
def iq3_xxs(block, group, grid, FIELD: tl.constexpr):
    sub, part = group // 2, group % 2
    word = load_word(block + 66 + 4 * sub, 2)
    pair = load_pair(block + 2 + 8 * sub + 2 * part + 4 * FIELD)
    low, high = load_word(grid + 4 * (pair & 255), 4), load_word(grid + 4 * (pair >> 8), 4)
    low, high = _signed(low, high, _even(word >> (7 * part) >> (14 * FIELD)))
    return low, high, load_half(block) * 0.25 * _odd(word >> 27), 0.0


@triton.jit
def iq3_s(block, group, grid, FIELD: tl.constexpr):
    sub, part = group // 2, group % 2
    pair = load_pair(block + 2 + 8 * sub + 2 * part + 4 * FIELD)
    bits = (load_byte(block + 66 + sub) << 7) >> (2 * part) >> (4 * FIELD)
    first, second = (pair & 255) | ((bits << 1) & 256), (pair >> 8) | (bits & 256)
    low, high = load_word(grid + 4 * first, 4), load_word(grid + 4 * second, 4)
    low, high = _signed(low, high, load_pair(block + 74 + 4 * sub + 2 * FIELD) >> (8 * part))
    scale = (load_byte(block + 106 + sub // 2) << 1) >> (4 * (sub % 2))
    return low, high, load_half(block) * _odd(scale), 0.0


@triton.jit
def read_grid(block, group, grid, FIELD: tl.constexpr, FORMAT: tl.constexpr):
    """Call the function of a format by its name, as `triton_formats.read` does."""
    if FORMAT == "IQ1_S":
        return iq1_s(block, group, grid, FIELD)
    elif FORMAT == "IQ1_M":
        return iq1_m(block, group, grid, FIELD)
    elif FORMAT == "IQ2_XXS":
        return iq2_xxs(block, group, grid, FIELD)
    elif FORMAT == "IQ2_XS":
        return iq2_xs(block, group, grid, FIELD)
    elif FORMAT == "IQ2_S":
        return iq2_s(block, group, grid, FIELD)
    elif FORMAT == "IQ3_XXS":
        return iq3_xxs(block, group, grid, FIELD)
    elif FORMAT == "IQ3_S":
        return iq3_s(block, group, grid, FIELD)
