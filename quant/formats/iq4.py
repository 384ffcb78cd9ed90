"""IQ4_NL and IQ4_XS: 4-bit codes, which are indices into a fixed codebook with uneven steps.

`unpack_*` takes blocks, uint8 (n, type_size), and returns what their weights consist of, bit-exact to ggml.

`pack_*` writes blocks, uint8 (n, type_size), from their fields. `d` are floats (n,). Integers may have any dtype:
`scales` (n, 8) from -32 to 31, `codes` (n, block_size) from 0 to 15.

Source: ggml-quants.c dequantize_row_iq4_nl, dequantize_row_iq4_xs; kvalues_iq4nl in ggml-common.h @ ggml 0.15.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bits import Affine, BlockLayout, fields, half, half_bytes, lookup, pack_bits, unpack_bits

IQ4_NL = BlockLayout(32, 18, factors=(0,))  # d f16 | qs 16
IQ4_XS = BlockLayout(256, 136, factors=(0,))  # d f16 | scales_h 2 (bits 4-5) | scales_l 4 (bits 0-3) | qs 128

KVALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def unpack_iq4_nl(blocks: Tensor) -> Affine:
    d, qs = fields(blocks, 2, 16)
    return Affine(lookup(unpack_bits(qs, 4, run=16), KVALUES), half(d))


def pack_iq4_nl(d: Tensor, codes: Tensor) -> Tensor:
    return torch.cat((half_bytes(d[:, None]), pack_bits(codes, 4, run=16)), 1)


def unpack_iq4_xs(blocks: Tensor) -> Affine:
    d, scales_h, scales_l, qs = fields(blocks, 2, 2, 4, 128)
    scale = unpack_bits(scales_l, 4, run=1) | unpack_bits(scales_h, 2, run=1) * 16
    return Affine(lookup(unpack_bits(qs, 4, run=16), KVALUES), half(d) * (scale.float() - 32))


def pack_iq4_xs(d: Tensor, scales: Tensor, codes: Tensor) -> Tensor:
    scale = (scales + 32).to(torch.uint8)
    scales_h = pack_bits(torch.div(scale, 16, rounding_mode="floor"), 2, run=1)
    return torch.cat(
        (half_bytes(d[:, None]), scales_h, pack_bits(scale & 15, 4, run=1), pack_bits(codes, 4, run=16)), 1
    )
