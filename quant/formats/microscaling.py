"""MXFP4 and NVFP4: four-bit floats (e2m1) with an eight-bit float as the scale of 32 or 16 weights.

`unpack_*` takes blocks, uint8 (n, type_size), and returns what their weights consist of, bit-exact to ggml.

Source: ggml-quants.c dequantize_row_{mxfp4,nvfp4}, ggml-impl.h ggml_{e8m0_to_fp32_half,ue4m3_to_fp32} @ ggml 0.15.3;
checked against 0.20.2. OCP Microscaling Formats (MX) 1.0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bits import Affine, BlockLayout, fields, lookup, pack_bits, unpack_bits

MXFP4 = BlockLayout(32, 17)  # e e8m0 | qs 16
NVFP4 = BlockLayout(64, 36)  # d 4 e4m3 (one for 16 weights) | qs 32

# Twice the e2m1 values, as in ggml, which halves the scales to make up for it.
KVALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def unpack_mxfp4(blocks: Tensor) -> Affine:
    e, qs = fields(blocks, 1, 16)
    return Affine(lookup(unpack_bits(qs, 4, run=16), KVALUES), _e8m0_half(e))


def encode_mxfp4(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    """Encode with the exponent of the largest magnitude as the scale and the nearest e2m1 values.

    Args:
        blocks: float32 (n, 32).
        importance: ignored.

    Returns:
        uint8 (n, 17), bit-equal to the PyPI package gguf 0.19.
    """
    amax = blocks.abs().amax(1, keepdim=True)
    e = torch.where(amax > 0, amax.log2().floor() + 125, 0).to(torch.uint8)
    d = _e8m0_half(e)
    codes, best = torch.zeros_like(blocks, dtype=torch.uint8), torch.full_like(blocks, torch.inf)
    for code, value in enumerate(KVALUES):
        error = (d * value - blocks).abs_()
        codes.masked_fill_(error < best, code)
        best = torch.minimum(best, error)
    return torch.cat((e, pack_bits(codes, 4, run=16)), 1)


def unpack_nvfp4(blocks: Tensor) -> Affine:
    d, qs = fields(blocks, 4, 32)
    return Affine(lookup(unpack_bits(qs, 4, run=8), KVALUES), _e4m3_half(d))


def _e8m0_half(e: Tensor) -> Tensor:
    """Return 2^(e - 128), half of the e8m0 value, as float32; the two smallest are subnormal."""
    bits = e.to(torch.int32)
    return torch.where(bits < 2, (bits + 1) << 21, (bits - 1) << 23).view(torch.float32)


def _e4m3_half(d: Tensor) -> Tensor:
    """Return half of the e4m3 value without its sign, as float32; NaN (0x7f) counts as 0, as in ggml."""
    # Float16 has 7 more bits of mantissa than e4m3, and its exponent has a bias of 15 instead of 7.
    bits = ((d & 0x7F).to(torch.int16) * 128).view(torch.float16)
    return bits.float().mul_(2.0**8 / 2).masked_fill_(d == 0x7F, 0)
