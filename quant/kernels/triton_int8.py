"""One Triton kernel from packed rows to rotated 8-bit integers: it reads blocks twice and writes one byte a weight.

A program takes ROWS rows, and of each row CHUNKS groups of 256 columns at a time. It decodes them with the code of
`triton_kernel`, rotates them in float32 and keeps the largest magnitude of each row. Then it does the same again, when
the blocks are in the cache, and rounds with the scale that is known by now.

A thread holds EACH weights of a group: 16 neighbors in each bit field of a byte. lanes threads share a group, so that a
rotation is arithmetic within a thread and shuffles between neighboring threads, without shared memory.

LoRAs are added to the rotated weights, from rows that a product of their rotated factors has made.

The operations and their order are those of `eager.int8_rows`, and so are the bits.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .eager import INT8_SCALE, SMALLEST_SCALE
from .triton_formats import FORMATS
from .triton_kernel import OPTIONS, TWO_TO_23, constants, grid_of, run_on_device
from .triton_rotation import rotated

if TYPE_CHECKING:
    from ..qtype import QuantType

GROUP = 256
"""Columns that are rotated together."""
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The types without blocks, such as rows to which a LoRA has been added."""

_THREADS_PER_ROW = 32
_ROWS = 4
_INT8_SCALE, _SMALLEST_SCALE = tl.constexpr(INT8_SCALE), tl.constexpr(SMALLEST_SCALE)


@triton.jit
def _places(row, columns, EACH: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr):
    """Return where the weights of each thread are in the first columns of all rows: int64 (EACH / 16, threads, 16)."""
    lanes: tl.constexpr = 256 // EACH
    thread = tl.arange(0, ROWS * CHUNKS * lanes)
    run, field = thread % lanes, tl.arange(0, EACH // 16)
    runs: tl.constexpr = SPAN // 2 if EACH > 16 else 1  # of 16 weights between the weights of neighboring fields
    first = run // runs * (runs * EACH) + run % runs * 16
    at = (row + thread // (CHUNKS * lanes)).to(tl.int64) * columns + thread // lanes % CHUNKS * 256 + first
    return (at[None, :] + (field * (16 * runs))[:, None])[:, :, None] + tl.arange(0, 16)[None, None, :]


@triton.jit
def _add(x, delta, EACH: tl.constexpr):
    """Add 16 times what `delta`, pointers (EACH / 16, threads, 16), points to: float32 (EACH, threads)."""
    change = tl.permute(tl.load(delta).to(tl.float32), (0, 2, 1))
    return tl.fma(tl.reshape(change, x.shape), 16.0, x)


@triton.jit
def int8_kernel(
    packed,
    codes,
    scales,
    n_rows,
    columns,
    integers,
    grid,
    delta,
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
    """Rotate rows and round them to 8-bit integers.

    Args:
        packed: uint8, starting at a 16-byte boundary; or numbers of a float dtype, which have BLOCK_SIZE 1.
        codes: int8 (n_rows, columns), contiguous.
        scales: float32 (n_rows).
        columns: a multiple of 256, at least CHUNKS * 256.
        integers, grid: as of `dequantize_kernel`.
        delta: what to add to the rotated rows, of any float dtype, like `codes`; or None.
    """
    lanes: tl.constexpr = 256 // EACH
    threads: tl.constexpr = ROWS * CHUNKS * lanes
    width: tl.constexpr = CHUNKS * 256
    # The last rows and columns begin early enough to end with the last. What is done twice has the same result.
    row = tl.minimum(tl.program_id(0) * ROWS, n_rows - ROWS)
    most = tl.zeros((threads,), tl.int32)
    for start in range(0, columns, width):
        column = tl.minimum(start, columns - width)
        x = rotated(
            packed,
            row,
            columns,
            column,
            integers,
            grid,
            FORMAT,
            BITS,
            FIELDS,
            SPAN,
            BIAS,
            HAS_MINIMUM,
            BLOCK_SIZE,
            TYPE_SIZE,
            EACH,
            ROWS,
            CHUNKS,
        )
        if delta is not None:
            x = _add(x, delta + _places(row, columns, EACH, SPAN, ROWS, CHUNKS) + column, EACH)
        # As integers, magnitudes have the same order, and NaN is above all of them.
        most = tl.maximum(most, tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0))
    largest = tl.max(tl.reshape(most, (ROWS, CHUNKS * lanes)), 1).to(tl.float32, bitcast=True)
    scale = largest * (_INT8_SCALE / 16)
    scale = tl.where(scale < _SMALLEST_SCALE, _SMALLEST_SCALE, scale)
    tl.store(scales + row + tl.arange(0, ROWS), scale)
    inverse = tl.broadcast_to(tl.div_rn(0.0625, scale)[:, None], (ROWS, CHUNKS * lanes))
    inverse = tl.reshape(inverse, (1, threads))
    places = _places(row, columns, EACH, SPAN, ROWS, CHUNKS)
    for start in range(0, columns, width):
        column = tl.minimum(start, columns - width)
        x = rotated(
            packed,
            row,
            columns,
            column,
            integers,
            grid,
            FORMAT,
            BITS,
            FIELDS,
            SPAN,
            BIAS,
            HAS_MINIMUM,
            BLOCK_SIZE,
            TYPE_SIZE,
            EACH,
            ROWS,
            CHUNKS,
        )
        if delta is not None:
            x = _add(x, delta + places + column, EACH)
        # At 1.5 * 2^23, neighboring float32 are integers, whose lowest eight bits are the code.
        code = (x * inverse + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
        code = tl.permute(tl.reshape(code, (EACH // 16, 16, threads)), (0, 2, 1))
        tl.store(codes + places + column, code)


class Shape(NamedTuple):
    """The constants of the kernel that depend on the shape of the weight."""

    EACH: int
    ROWS: int
    CHUNKS: int


def shape_of(qtype: QuantType, n_rows: int, columns: int) -> Shape:
    """Return how many weights of a group a thread holds, and the rows and groups of a program."""
    form = FORMATS.get(qtype.name)
    each = 16 if form is None else 8 * form.fields * (2 if form.span > 1 else 1)
    chunks = min(_THREADS_PER_ROW * each // GROUP, 1 << ((columns // GROUP).bit_length() - 1))
    return Shape(each, min(_ROWS, 1 << (n_rows.bit_length() - 1)), chunks)


def launch(qtype: QuantType, packed: Tensor, codes: Tensor, scales: Tensor, delta: Tensor | None = None) -> None:
    """Launch the kernel on the current device, without regard to the device of the tensors.

    Args:
        packed: uint8, the blocks of `codes`, contiguous from a 16-byte boundary.
        codes: int8, (n_rows, columns), contiguous, with columns that are a multiple of 256; written to.
        scales: float32, (n_rows, 1), contiguous; written to.
        delta: what to add to the rotated rows, of any float dtype, like `codes`, contiguous; or None.
    """
    n_rows, columns = codes.shape
    shape = shape_of(qtype, n_rows, columns)
    if qtype.name in PLAIN:
        packed = packed.view(PLAIN[qtype.name])
    arguments = (packed, codes, scales, n_rows, columns, TWO_TO_23.value, grid_of(qtype, packed.device), delta)
    int8_kernel[(-(-n_rows // shape.ROWS),)](*arguments, **constants(qtype), **shape._asdict(), **OPTIONS)


def int8_rows(qtype: QuantType, packed: Tensor, codes: Tensor, scales: Tensor, delta: Tensor | None) -> bool:
    """Rotate and round rows as `eager.int8_rows` does, and return whether the type is known here.

    Args:
        packed: uint8, the blocks of `codes`, contiguous from a 16-byte boundary.
        codes: int8, (n_rows, columns), contiguous, with columns that are a multiple of 256; written to.
        scales: float32, (n_rows, 1), contiguous; written to.
        delta: what to add to the rotated rows, of any float dtype, like `codes`, contiguous; or None.

    Raises:
        RuntimeError: Triton cannot compile for the device, or has no driver for it.
    """
    if qtype.name not in FORMATS and qtype.name not in PLAIN:
        return False
    kind = (qtype.name, torch.int8, delta is None, packed.device)
    run_on_device(kind, packed.device, lambda: launch(qtype, packed, codes, scales, delta))
    return True
