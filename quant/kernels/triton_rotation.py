"""Rotated weights for Triton, decoded with the code of `triton_kernel`.

A thread holds EACH weights of a group of 256: 16 neighbors in each bit field of a byte. 256 / EACH threads share a
group. A rotation is arithmetic within a thread and shuffles between neighboring threads, without shared memory.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from .triton_formats import read
from .triton_kernel import values


@triton.jit
def _mix(x, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Replace a, b, c, d by (a + b) + (c + d) minus twice each; LOW and HIGH are the axes of their two-bit number.

    The rotation also reverses them. Instead, all weights are read in reverse order, once for all four steps.
    """
    total = tl.sum(tl.sum(x, LOW, keep_dims=True), HIGH, keep_dims=True)
    return tl.fma(x, -2.0, tl.broadcast_to(total, x.shape))


@triton.jit
def _eight(
    block,
    group,
    integers,
    grid,
    FIELD: tl.constexpr,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    BIAS: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
):
    """Dequantize one bit field of a group in reverse: float32 (2, 4, threads)."""
    low, high, scale, minimum = read(block, group, grid, FIELD, FORMAT)
    word = tl.permute(tl.join(high, low), (1, 0)).to(tl.uint32)[:, None, :]
    byte = 3 - tl.arange(0, 4)[None, :, None]
    scale = scale[None, None, :]
    if HAS_MINIMUM:
        minimum = minimum[None, None, :]
    return values(word, byte, scale, minimum, integers, BITS, BIAS, HAS_MINIMUM)


@triton.jit
def _field(
    block,
    first,
    integers,
    grid,
    PAIR: tl.constexpr,
    FIELD: tl.constexpr,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    BIAS: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
):
    """Dequantize one bit field of a group or two neighboring ones in reverse: float32 (2, 4, threads) or one axis more.

    Args:
        first: the number of the first group in its block. All groups of a thread are in one block.
    """
    x = _eight(block, first + PAIR - 1, integers, grid, FIELD, FORMAT, BITS, BIAS, HAS_MINIMUM)
    if PAIR == 2:
        y = _eight(block, first, integers, grid, FIELD, FORMAT, BITS, BIAS, HAS_MINIMUM)
        x = tl.permute(tl.join(x, y), (3, 0, 1, 2))
    return x


@triton.jit
def _plain(pointer):
    """Load 16 neighbors for each thread in reverse: float32 (2, 2, 2, 2, threads)."""
    x = tl.load(pointer[None, :] + tl.arange(0, 16)[:, None]).to(tl.float32).to(tl.int32, bitcast=True)
    x = tl.reshape(x, (2, 2, 2, 2, pointer.shape[0]))
    # Each of two integers becomes their sum minus itself. The compiler only swaps the names of their registers.
    for axis in tl.static_range(4):
        x = tl.sum(x, axis, keep_dims=True) - x
    return x.to(tl.float32, bitcast=True)


@triton.jit
def rotated(
    packed,
    row,
    columns,
    column,
    integers,
    grid,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
    SPAN: tl.constexpr,
    BIAS: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TYPE_SIZE: tl.constexpr,
    EACH: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Return 16 times the rotated weights of some columns: float32 (EACH, threads)."""
    lanes: tl.constexpr = 256 // EACH
    thread = tl.arange(0, ROWS * CHUNKS * lanes).to(tl.uint32)
    line = (row + thread // (CHUNKS * lanes)).to(tl.int64)
    column += thread // lanes % CHUNKS * 256
    turned = lanes - 1 - thread % lanes
    if BLOCK_SIZE == 1:
        x = _plain(packed + line * columns + column + 16 * turned)
    else:
        pair: tl.constexpr = EACH // (8 * FIELDS)
        groups: tl.constexpr = BLOCK_SIZE // (8 * FIELDS)
        base = packed + line * (columns // BLOCK_SIZE * TYPE_SIZE) + column // BLOCK_SIZE * TYPE_SIZE
        block, first = base + turned * pair // groups * TYPE_SIZE, turned * pair % groups
        x = _field(block, first, integers, grid, pair, 0, FORMAT, BITS, BIAS, HAS_MINIMUM)
        if FIELDS >= 2:
            y = _field(block, first, integers, grid, pair, 1, FORMAT, BITS, BIAS, HAS_MINIMUM)
            if FIELDS == 4:
                z = _field(block, first, integers, grid, pair, 2, FORMAT, BITS, BIAS, HAS_MINIMUM)
                w = _field(block, first, integers, grid, pair, 3, FORMAT, BITS, BIAS, HAS_MINIMUM)
                x, y = tl.join(z, x), tl.join(w, y)
                x = tl.permute(tl.join(y, x), (4, 5, 0, 1, 2, 3))
            elif pair == 2:
                x = tl.permute(tl.join(y, x), (4, 0, 1, 2, 3))
            else:
                x = tl.permute(tl.join(y, x), (3, 0, 1, 2))
    # One axis for each bit of a column's number in its group: first those of the fields, then bits 3 to 0 and, after
    # rows and chunks, the other ones of bits 7 to 4.
    if EACH == 16:
        x = tl.reshape(x, (2, 2, 2, 2, ROWS * CHUNKS, 2, 2, 2, 2))
        x = _mix(_mix(_mix(_mix(x, 3, 2), 1, 0), 8, 7), 6, 5)
    elif EACH == 64:  # bits 6 5 3 2 1 0 . 7 4
        x = tl.reshape(x, (2, 2, 2, 2, 2, 2, ROWS * CHUNKS, 2, 2))
        x = _mix(_mix(_mix(_mix(x, 5, 4), 3, 2), 8, 1), 0, 7)
    elif SPAN == 4:  # bits 5 3 2 1 0 . 7 6 4
        x = tl.reshape(x, (2, 2, 2, 2, 2, ROWS * CHUNKS, 2, 2, 2))
        x = _mix(_mix(_mix(_mix(x, 4, 3), 2, 1), 8, 0), 7, 6)
    else:  # bits 4 3 2 1 0 . 7 6 5
        x = tl.reshape(x, (2, 2, 2, 2, 2, ROWS * CHUNKS, 2, 2, 2))
        x = _mix(_mix(_mix(_mix(x, 4, 3), 2, 1), 0, 8), 7, 6)
    return tl.reshape(x, (EACH, ROWS * CHUNKS * lanes))
