"""One Triton kernel for all formats: reads blocks as they lie in the file once, writes weights once, nothing between.

A program decodes TILE weights; a thread eight neighbours, so that it stores 16 bytes of float16. Offsets within a
program are int32, its base is int64.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from .triton_formats import FORMATS, read

if TYPE_CHECKING:
    from ..qtype import QuantType

TILE = 4096
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
"""A fused multiply-add would round otherwise than ggml does."""

# IQ4's levels (iq4.KVALUES) as bytes: codes 0 to 7, and 8 to 15.
_LEVELS_LOW = tl.constexpr(0xF6EADDCFBFAD9881 - (1 << 64))
_LEVELS_HIGH = tl.constexpr(0x7159453526190D01)


@triton.jit(do_not_specialize=["n_weights"])
def dequantize_kernel(
    packed,
    out,
    n_weights,
    FORMAT: tl.constexpr,
    BIAS: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TYPE_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """packed: uint8, from a 16-byte boundary; out: n_weights of a float dtype, contiguous."""
    start = tl.program_id(0).to(tl.int64) * TILE
    groups = tl.minimum(n_weights - start, TILE).to(tl.int32) // 8
    group = tl.arange(0, TILE // 8)
    inside = tl.minimum(group, groups - 1).to(tl.uint32)  # unsigned: // and % are a shift and a mask
    block = packed + start // BLOCK_SIZE * TYPE_SIZE + inside // (BLOCK_SIZE // 8) * TYPE_SIZE
    low, high, scale, minimum = read(block, inside % (BLOCK_SIZE // 8), FORMAT)

    words = tl.join(low, high).to(tl.int32)
    codes = (words[:, :, None] >> (8 * tl.arange(0, 4))[None, None, :]) & 255
    codes = tl.reshape(codes, (TILE // 8, 8))
    if BIAS is None:
        levels = tl.where(codes < 8, _LEVELS_LOW, _LEVELS_HIGH)
        codes = (levels >> (8 * (codes & 7)).to(tl.int64)).to(tl.int8).to(tl.int32)
    else:
        codes -= BIAS
    weights = codes.to(tl.float32) * scale[:, None]
    if HAS_MINIMUM:
        weights -= minimum[:, None]
    offsets = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(out + start + offsets, weights.to(out.dtype.element_ty), mask=group[:, None] < groups)


def constants(qtype: QuantType) -> dict[str, object]:
    """The kernel's constants for a type of FORMATS."""
    form = FORMATS[qtype.name]
    return {
        "FORMAT": qtype.name,
        "BIAS": form.bias,
        "HAS_MINIMUM": form.has_minimum,
        "BLOCK_SIZE": qtype.block_size,
        "TYPE_SIZE": qtype.type_size,
        "TILE": TILE,
    }


def launch(qtype: QuantType, packed: Tensor, out: Tensor) -> None:
    """On the current device, whatever the tensors are on."""
    grid = (triton.cdiv(out.numel(), TILE),)
    dequantize_kernel[grid](packed, out, out.numel(), **constants(qtype), **OPTIONS)


def dequantize(qtype: QuantType, packed: Tensor, out: Tensor) -> None:
    """See `OptionalPath`; RuntimeError if Triton cannot compile for the device, or does not drive it."""
    with getattr(torch, packed.device.type).device(packed.device):
        try:
            launch(qtype, packed, out)
        except TritonError as error:
            raise RuntimeError(f"{qtype.name} does not compile: {error}") from error
