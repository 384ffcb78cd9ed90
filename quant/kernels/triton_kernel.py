"""One Triton kernel for all formats: reads blocks as they lie in the file once, writes weights once, nothing between.

A program decodes TILE weights, a thread eight neighbours at a time, so that it stores 16 bytes of float16. Offsets
within a program are int32, its base is int64. On a fast GPU integer units are what runs short first, so codes become
numbers by the layout of float32 rather than by conversions.
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

if TYPE_CHECKING:
    from ..qtype import QuantType

TILE = 4096
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
"""A fused multiply-add would round otherwise than ggml does."""
# 2^23 as float32: with an integer below 2^23 in its lowest bits, it is 2^23 and that integer.
_INTEGERS = tl.constexpr(0x4B000000)
_loaded: set[tuple[str, torch.dtype, torch.device]] = set()


@triton.jit
def _codebook(x):
    """iq4.KVALUES of code - 8: a polynomial comes within 0.44 of each of them, and is rounded.

    A table would take shifts of 64 bits, of the integer units.
    """
    level = tl.fma(tl.fma(tl.fma(tl.fma(x, 0.001586, 0.08184), x, -0.01681), x, 11.44), x, 1.433)
    return (level + 12582912.0) - 12582912.0  # 1.5 * 2^23, where neighbours in float32 are integers


@triton.jit
def _weights(
    block,
    octet,
    integers,
    ROW: tl.constexpr,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    BIAS: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
):
    """(octets, 8) float32: a row of every octet."""
    low, high, scale, minimum = read(block, octet, ROW, FORMAT)
    # Of a word the lower half, and the upper half shifted there; of each the upper byte in place, 256 times too large.
    word = tl.join(low, high).to(tl.uint32)[:, :, None]
    byte = tl.arange(0, 4)[None, None, :]
    place, unit = 8 * (byte % 2), tl.where(byte % 2 == 0, 1.0, 1 / 256)
    code = (word >> (16 * (byte // 2))) & (((1 << BITS) - 1) << place) | integers
    zero = _INTEGERS + ((8 if BIAS is None else BIAS) << place)
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
    n_weights,
    integers,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
    BIAS: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TYPE_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """packed: uint8, from a 16-byte boundary; out: n_weights >= TILE of a float dtype, contiguous.

    integers: _INTEGERS. As an argument it stays in a register, where a constant takes another instruction a weight.
    """
    # The last program steps back to end where the weights end: some are decoded twice, and none needs a mask.
    start = tl.minimum(tl.program_id(0).to(tl.int64) * TILE, n_weights - TILE)
    octet = tl.arange(0, TILE // (8 * ROWS)).to(tl.uint32)  # unsigned: // and % are a shift and a mask
    inside = octet % (BLOCK_SIZE // (8 * ROWS))
    block = packed + start // BLOCK_SIZE * TYPE_SIZE + octet // (BLOCK_SIZE // (8 * ROWS)) * TYPE_SIZE
    # All rows are read before one is written: the compiler then loads what they share once.
    first = _weights(block, inside, integers, 0, FORMAT, BITS, BIAS, HAS_MINIMUM)
    if ROWS >= 2:
        second = _weights(block, inside, integers, 1, FORMAT, BITS, BIAS, HAS_MINIMUM)
    if ROWS >= 4:
        third = _weights(block, inside, integers, 2, FORMAT, BITS, BIAS, HAS_MINIMUM)
        fourth = _weights(block, inside, integers, 3, FORMAT, BITS, BIAS, HAS_MINIMUM)
    offset = octet // SPAN * (8 * SPAN * ROWS) + octet % SPAN * 8
    to = out + start + offset[:, None] + tl.arange(0, 8)[None, :]
    tl.store(to, first.to(out.dtype.element_ty))
    if ROWS >= 2:
        tl.store(to + 8 * SPAN, second.to(out.dtype.element_ty))
    if ROWS >= 4:
        tl.store(to + 16 * SPAN, third.to(out.dtype.element_ty))
        tl.store(to + 24 * SPAN, fourth.to(out.dtype.element_ty))


def constants(qtype: QuantType) -> dict[str, object]:
    """The kernel's constants for a type of FORMATS, besides TILE."""
    form = FORMATS[qtype.name]
    return {
        "FORMAT": qtype.name,
        "BITS": form.bits,
        "ROWS": form.rows,
        "SPAN": form.span,
        "BIAS": form.bias,
        "HAS_MINIMUM": form.has_minimum,
        "BLOCK_SIZE": qtype.block_size,
        "TYPE_SIZE": qtype.type_size,
    }


def launch(qtype: QuantType, packed: Tensor, out: Tensor) -> None:
    """On the current device, whatever the tensors are on."""
    n_weights = out.numel()
    tile = min(TILE, 1 << (n_weights.bit_length() - 1))
    grid = (-(-n_weights // tile),)
    dequantize_kernel[grid](packed, out, n_weights, _INTEGERS.value, TILE=tile, **constants(qtype), **OPTIONS)


def dequantize(qtype: QuantType, packed: Tensor, out: Tensor) -> bool:
    """Dequantize as `OptionalPath` describes, if the type is one of FORMATS.

    Raises:
        RuntimeError: Triton cannot compile for the device, or does not drive it.
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
