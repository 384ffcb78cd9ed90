"""One Triton kernel for all formats: it reads blocks as they are in the file once, and writes the weights once.

A program dequantizes TILE weights. A thread dequantizes eight neighboring weights at a time, so that it stores 16 bytes
of float16. Offsets within a program are int32, and the offset of a program is int64. On a fast GPU, the integer units
are the first to limit the speed. So codes become floats by their bit pattern instead of by conversion instructions.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from ..device import lasting_allocations
from .triton_formats import FORMATS, read
from .triton_grids import grid_codes

if TYPE_CHECKING:
    from ..qtype import QuantType

TILE = 4096
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
"""Without fused multiply-adds, which round differently than ggml does."""
# The bits of 2^23 as float32. With an integer below 2^23 in the lowest bits, these are the bits of 2^23 + integer.
_TWO_TO_23 = tl.constexpr(0x4B000000)
_loaded: set[tuple[str, torch.dtype, torch.device]] = set()


@triton.jit
def _codebook(x):
    """Return the entry of IQ4's codebook (`iq4.KVALUES`) for x = code - 8: a polynomial within 0.44 of it, rounded.

    A table would need 64-bit shifts, which use the integer units.
    """
    value = tl.fma(tl.fma(tl.fma(tl.fma(x, 0.001586, 0.08184), x, -0.01681), x, 11.44), x, 1.433)
    return (value + 12582912.0) - 12582912.0  # at 1.5 * 2^23, neighboring float32 are integers


@triton.jit
def _weights(
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
    """Dequantize one bit field of every group, float32 (groups, 8)."""
    low, high, scale, minimum = read(block, group, grid, FIELD, FORMAT)
    # Each half of a word is moved to the lower half. Its lower byte is used as it is. Its upper byte stays in place, so
    # that its code is 256 times too large, which `unit` undoes.
    word = tl.join(low, high).to(tl.uint32)[:, :, None]
    byte = tl.arange(0, 4)[None, None, :]
    place, unit = 8 * (byte % 2), tl.where(byte % 2 == 0, 1.0, 1 / 256)
    code = (word >> (16 * (byte // 2))) & (((1 << BITS) - 1) << place) | integers
    zero = _TWO_TO_23 + ((8 if BIAS is None else BIAS) << place)
    code = code.to(tl.float32, bitcast=True) - zero.to(tl.float32, bitcast=True)
    if BIAS is None:  # noqa: SIM108
        weight = _codebook(code * unit) * scale[:, None, None]
    else:
        weight = code * (unit * scale[:, None, None])
    if HAS_MINIMUM:
        weight -= minimum[:, None, None]
    return tl.reshape(weight, (block.shape[0], 8))


@triton.jit
def dequantize_kernel(
    packed,
    out,
    n_elements,
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
    TILE: tl.constexpr,
):
    """Dequantize blocks.

    Args:
        packed: uint8, starting at a 16-byte boundary.
        out: `n_elements` of a float dtype, at least TILE, contiguous.
        integers: _TWO_TO_23. An argument stays in a register, while a constant costs one more instruction per weight.
        grid: `grid_codes` of the type, uint8, (rows, 8 or 4); None for a type without a grid.
    """
    # The last program starts early enough to end with the last weight. Some weights are then dequantized twice, but no
    # program needs a mask.
    start = tl.minimum(tl.program_id(0).to(tl.int64) * TILE, n_elements - TILE)
    group = tl.arange(0, TILE // (8 * FIELDS)).to(tl.uint32)  # unsigned: // and % are a shift and a mask
    inside = group % (BLOCK_SIZE // (8 * FIELDS))
    block = packed + start // BLOCK_SIZE * TYPE_SIZE + group // (BLOCK_SIZE // (8 * FIELDS)) * TYPE_SIZE
    # All fields are read before any is written, so that the compiler loads only once what they share.
    first = _weights(block, inside, integers, grid, 0, FORMAT, BITS, BIAS, HAS_MINIMUM)
    if FIELDS >= 2:
        second = _weights(block, inside, integers, grid, 1, FORMAT, BITS, BIAS, HAS_MINIMUM)
    if FIELDS >= 4:
        third = _weights(block, inside, integers, grid, 2, FORMAT, BITS, BIAS, HAS_MINIMUM)
        fourth = _weights(block, inside, integers, grid, 3, FORMAT, BITS, BIAS, HAS_MINIMUM)
    offset = group // SPAN * (8 * SPAN * FIELDS) + group % SPAN * 8
    to = out + start + offset[:, None] + tl.arange(0, 8)[None, :]
    tl.store(to, first.to(out.dtype.element_ty))
    if FIELDS >= 2:
        tl.store(to + 8 * SPAN, second.to(out.dtype.element_ty))
    if FIELDS >= 4:
        tl.store(to + 16 * SPAN, third.to(out.dtype.element_ty))
        tl.store(to + 24 * SPAN, fourth.to(out.dtype.element_ty))


def constants(qtype: QuantType) -> dict[str, object]:
    """Return the kernel's constants, except TILE, for a type of FORMATS."""
    form = FORMATS[qtype.name]
    return {
        "FORMAT": qtype.name,
        "BITS": form.bits,
        "FIELDS": form.fields,
        "SPAN": form.span,
        "BIAS": form.bias,
        "HAS_MINIMUM": form.has_minimum,
        "BLOCK_SIZE": qtype.block_size,
        "TYPE_SIZE": qtype.type_size,
    }


def launch(qtype: QuantType, packed: Tensor, out: Tensor) -> None:
    """Launch the kernel on the current device, without regard to the device of the tensors.

    Args:
        packed: uint8, (n * type_size), contiguous from a 16-byte boundary.
        out: any float dtype, (n * block_size), contiguous.
    """
    n_elements = out.numel()
    tile = min(TILE, 1 << (n_elements.bit_length() - 1))
    programs = (-(-n_elements // tile),)
    steps = FORMATS[qtype.name].grid_steps
    grid = grid_codes(qtype.name, steps, packed.device) if steps else None
    arguments = (packed, out, n_elements, _TWO_TO_23.value, grid)
    dequantize_kernel[programs](*arguments, TILE=tile, **constants(qtype), **OPTIONS)


def dequantize(qtype: QuantType, packed: Tensor, out: Tensor) -> bool:
    """Dequantize blocks, and return whether the type is one of FORMATS.

    Args:
        packed: uint8, (n * type_size), contiguous from a 16-byte boundary.
        out: any float dtype, (n * block_size), contiguous.

    Raises:
        RuntimeError: Triton cannot compile for the device, or has no driver for it.
    """
    if qtype.name not in FORMATS:
        return False
    kernel = (qtype.name, out.dtype, packed.device)
    # The first launch loads the kernel, which stays on the device.
    with (
        getattr(torch, packed.device.type).device(packed.device),
        nullcontext() if kernel in _loaded else lasting_allocations(),
    ):
        try:
            launch(qtype, packed, out)
        except TritonError as error:
            raise RuntimeError(f"{qtype.name} does not compile: {error}") from error
    _loaded.add(kernel)
    return True
