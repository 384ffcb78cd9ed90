"""One Triton kernel for all formats: it reads blocks as they are in the file once, and writes the weights once.

A program dequantizes TILE weights. A thread dequantizes eight neighboring weights at a time, so that it stores 16 bytes
of float16. Offsets within a program are int32, and the offset of a program is int64. On a fast GPU, the integer units
are the first to limit the speed. So codes become floats by their bit pattern instead of by conversion instructions.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from ..device import lasting_allocations
from .triton_formats import FORMATS, CodeLayout, read
from .triton_grids import grid_codes

if TYPE_CHECKING:
    from ..qtype import QuantType

TILE = 4096
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
"""Without fused multiply-adds, which round differently than ggml does."""
# The bits of 2^23 as float32. With an integer below 2^23 in the lowest bits, these are the bits of 2^23 + integer.
TWO_TO_23 = tl.constexpr(0x4B000000)
_loaded: set[tuple[object, ...]] = set()


@triton.jit
def _codebook(x):
    """Return the entry of IQ4's codebook (`iq4.KVALUES`) for x = code - 8: a polynomial within 0.44 of it, rounded.

    A table would need 64-bit shifts, which use the integer units.
    """
    value = tl.fma(tl.fma(tl.fma(tl.fma(x, 0.001586, 0.08184), x, -0.01681), x, 11.44), x, 1.433)
    return (value + 12582912.0) - 12582912.0  # at 1.5 * 2^23, neighboring float32 are integers


@triton.jit
def values(word, byte, scale, minimum, integers, BITS: tl.constexpr, BIAS: tl.constexpr, HAS_MINIMUM: tl.constexpr):
    """Return the weight whose code is in a byte of a word: float32, of the shape that the arguments broadcast to."""
    # Each half of a word is moved to the lower half. Its lower byte is used as it is. Its upper byte stays in place, so
    # that its code is 256 times too large, which `unit` undoes.
    place, unit = 8 * (byte % 2), tl.where(byte % 2 == 0, 1.0, 1 / 256)
    code = (word >> (16 * (byte // 2))) & (((1 << BITS) - 1) << place) | integers
    zero = TWO_TO_23 + ((8 if BIAS is None else BIAS) << place)
    code = code.to(tl.float32, bitcast=True) - zero.to(tl.float32, bitcast=True)
    if BIAS is None:  # noqa: SIM108
        weight = _codebook(code * unit) * scale
    else:
        weight = code * (unit * scale)
    if HAS_MINIMUM:
        weight -= minimum
    return weight


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
    word = tl.join(low, high).to(tl.uint32)[:, :, None]
    scale = scale[:, None, None]
    if HAS_MINIMUM:
        minimum = minimum[:, None, None]
    byte = tl.arange(0, 4)[None, None, :]
    weight = values(word, byte, scale, minimum, integers, BITS, BIAS, HAS_MINIMUM)
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
        integers: TWO_TO_23. An argument stays in a register, while a constant costs one more instruction per weight.
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
    """Return the constants of a type: those of the kernel, except TILE."""
    form = FORMATS.get(qtype.name, CodeLayout(0, fields=1))
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


def grid_of(qtype: QuantType, device: torch.device) -> Tensor | None:
    """Return the argument `grid` of the kernels: uint8 (rows, 8 or 4), or None for a type without a grid."""
    steps = FORMATS[qtype.name].grid_steps if qtype.name in FORMATS else 0
    return grid_codes(qtype.name, steps, device) if steps else None


def launch(qtype: QuantType, packed: Tensor, out: Tensor) -> None:
    """Launch the kernel on the current device, without regard to the device of the tensors.

    Args:
        packed: uint8, (n * type_size), contiguous from a 16-byte boundary.
        out: any float dtype, (n * block_size), contiguous.
    """
    n_elements = out.numel()
    tile = min(TILE, 1 << (n_elements.bit_length() - 1))
    programs = (-(-n_elements // tile),)
    arguments = (packed, out, n_elements, TWO_TO_23.value, grid_of(qtype, packed.device))
    dequantize_kernel[programs](*arguments, TILE=tile, **constants(qtype), **OPTIONS)


def run_on_device(kernel: tuple[object, ...], device: torch.device, call: Callable[[], None]) -> None:
    """Call a function that launches a kernel, on a device; the first launch loads the kernel, which stays there.

    Args:
        kernel: what tells the kernel from others, the name of the type first.

    Raises:
        RuntimeError: Triton cannot compile for the device, or has no driver for it.
    """
    loaded = nullcontext() if kernel in _loaded else lasting_allocations()
    with getattr(torch, device.type).device(device), loaded:
        try:
            call()
        except TritonError as error:
            raise RuntimeError(f"{kernel[0]} does not compile: {error}") from error
    _loaded.add(kernel)


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
    run_on_device((qtype.name, out.dtype, packed.device), packed.device, lambda: launch(qtype, packed, out))
    return True
