"""K-quants, Q2_K to Q6_K: blocks of 256 weights whose sub-blocks have small integer scales.

`unpack_*` takes blocks, uint8 (n, type_size), and returns what their weights consist of, bit-exact to ggml.

`pack_*` writes blocks, uint8 (n, type_size), from their fields. `d` and `dmin` are floats (n,). Integers may have any
dtype: `scales` and `mins` (n, sub-blocks), `codes` (n, 256).

Source: ggml-quants.c dequantize_row_q{2,3,4,5,6}_K, struct block_q*_K in ggml-common.h @ ggml 0.15.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bits import Affine, BlockLayout, centered, fields, half, half_bytes, pack_bits, unpack_bits

# scales 16 (low nibble scale, high nibble min) | qs 64 | d f16 | dmin f16
Q2_K = BlockLayout(256, 84, factors=(80, 82))
# hmask 32 (bit 2 of the codes) | qs 64 | scales 12 (6 bits, biased by 32) | d f16
Q3_K = BlockLayout(256, 110, factors=(108,))
# d f16 | dmin f16 | scales 12 (6-bit scales and mins) | qs 128
Q4_K = BlockLayout(256, 144, factors=(0, 2))
# d f16 | dmin f16 | scales 12 (as Q4_K) | qh 32 (bit 4 of the codes) | qs 128
Q5_K = BlockLayout(256, 176, factors=(0, 2))
# ql 128 (bits 0-3) | qh 64 (bits 4-5) | scales 16 int8 | d f16
Q6_K = BlockLayout(256, 210, factors=(208,))


def unpack_q2_k(blocks: Tensor) -> Affine:
    scales, qs, d, dmin = fields(blocks, 16, 64, 2, 2)
    scale, minimum = unpack_bits(scales, 4, run=16).view(-1, 2, 16).unbind(1)
    return Affine(unpack_bits(qs, 2, run=32), half(d) * scale, half(dmin) * minimum)


def pack_q2_k(d: Tensor, dmin: Tensor, scales: Tensor, mins: Tensor, codes: Tensor) -> Tensor:
    packed_scales = pack_bits(torch.cat((scales, mins), 1), 4, run=16)
    return torch.cat((packed_scales, pack_bits(codes, 2, run=32), half_bytes(d[:, None]), half_bytes(dmin[:, None])), 1)


def unpack_q3_k(blocks: Tensor) -> Affine:
    hmask, qs, scales, d = fields(blocks, 32, 64, 12, 2)
    low, high = torch.split(scales, [8, 4], 1)
    scale = unpack_bits(low, 4, run=8) | unpack_bits(high, 2, run=4) * 16
    codes = unpack_bits(qs, 2, run=32).add_(unpack_bits(hmask, 1, run=32), alpha=4)
    return Affine(centered(codes, 4), half(d) * (scale.float() - 32))


def pack_q3_k(d: Tensor, scales: Tensor, codes: Tensor) -> Tensor:
    """Write Q3_K blocks from scales from -32 to 31 and codes from -4 to 3; shapes as in the module docstring."""
    scale, code = (scales + 32).to(torch.uint8), (codes + 4).to(torch.uint8)
    low, high = pack_bits(scale & 15, 4, run=8), pack_bits(_shifted(scale, 4), 2, run=4)
    hmask, qs = pack_bits(_shifted(code, 2), 1, run=32), pack_bits(code & 3, 2, run=32)
    return torch.cat((hmask, qs, low, high, half_bytes(d[:, None])), 1)


def unpack_q4_k(blocks: Tensor) -> Affine:
    factors, scales, qs = fields(blocks, 4, 12, 128)
    return Affine(unpack_bits(qs, 4, run=32), *_scales_and_mins(factors, scales))


def pack_q4_k(d: Tensor, dmin: Tensor, scales: Tensor, mins: Tensor, codes: Tensor) -> Tensor:
    head = half_bytes(torch.stack((d, dmin), 1))
    return torch.cat((head, _pack_scales(scales, mins), pack_bits(codes, 4, run=32)), 1)


def unpack_q5_k(blocks: Tensor) -> Affine:
    factors, scales, qh, qs = fields(blocks, 4, 12, 32, 128)
    codes = unpack_bits(qs, 4, run=32).add_(unpack_bits(qh, 1, run=32), alpha=16)
    return Affine(codes, *_scales_and_mins(factors, scales))


def pack_q5_k(d: Tensor, dmin: Tensor, scales: Tensor, mins: Tensor, codes: Tensor) -> Tensor:
    code = codes.to(torch.uint8)
    head = half_bytes(torch.stack((d, dmin), 1))
    qh, qs = pack_bits(_shifted(code, 4), 1, run=32), pack_bits(code & 15, 4, run=32)
    return torch.cat((head, _pack_scales(scales, mins), qh, qs), 1)


def unpack_q6_k(blocks: Tensor) -> Affine:
    ql, qh, scales, d = fields(blocks, 128, 64, 16, 2)
    codes = unpack_bits(ql, 4, run=64).add_(unpack_bits(qh, 2, run=32), alpha=16)
    return Affine(centered(codes, 32), half(d) * scales.view(torch.int8))


def pack_q6_k(d: Tensor, scales: Tensor, codes: Tensor) -> Tensor:
    """Write Q6_K blocks from scales from -128 to 127 and codes from -32 to 31; shapes as in the module docstring."""
    code = (codes + 32).to(torch.uint8)
    ql, qh = pack_bits(code & 15, 4, run=64), pack_bits(_shifted(code, 4), 2, run=32)
    return torch.cat((ql, qh, scales.to(torch.int8).view(torch.uint8), half_bytes(d[:, None])), 1)


def _scales_and_mins(factors: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply 8 scales by d and 8 mins by dmin, each float32 (n, 8).

    The first eight bytes hold four scales and four mins in their lower six bits. The other scales and mins have their
    lower four bits in the last four bytes. Their upper two bits are the upper bits of the first eight bytes.

    Args:
        factors: d and dmin, uint8 (n, 4).
        scales: scales and mins of 6 bits, uint8 (n, 12).

    Source: ggml-quants.c get_scale_min_k4.
    """
    words = scales.view(torch.int32)
    first, nibbles = words[:, :2], words[:, 2:]
    low = first & 0x3F3F3F3F
    high = torch.cat((nibbles, nibbles >> 4), 1) & 0x0F0F0F0F | (first >> 2) & 0x30303030
    scales_and_mins = torch.stack((low, high), 2).view(torch.uint8).view(-1, 2, 8)
    scale, minimum = scales_and_mins.mul(half(factors)[:, :, None]).unbind(1)
    return scale, minimum


def _pack_scales(scales: Tensor, mins: Tensor) -> Tensor:
    low = torch.cat((scales[:, :4], mins[:, :4]), 1).to(torch.uint8)
    high = torch.cat((scales[:, 4:], mins[:, 4:]), 1).to(torch.uint8)
    return torch.cat((low | _shifted(high, 4) * 64, pack_bits(high & 15, 4, run=4)), 1)


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Shift uint8 values right; the shift operators for uint8 do not exist on every backend."""
    return torch.div(values, 1 << bits, rounding_mode="floor")
