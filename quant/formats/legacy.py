"""F32, F16, BF16 and ggml's first block formats, which have one or two float16 factors for 32 weights.

`unpack_*` takes blocks, uint8 (n, type_size), and returns what their weights consist of, bit-exact to ggml.

`encode_*` takes float32 (n, block_size) and returns uint8 (n, type_size). The bytes are those that ggml writes without
an importance matrix; `importance` is ignored.

`pack_*` writes blocks, uint8 (n, type_size), from their fields. `d` and `m` are floats (n, 1). `codes` are integers of
any dtype (n, 32), as the block stores them.

Source: ggml-quants.c dequantize_row_q{4_0,4_1,5_0,5_1,8_0}, quantize_row_q*_ref @ ggml 0.15.3; checked against 0.20.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bits import Affine, BlockLayout, centered, fields, half, half_bytes, pack_bits, quotient, unpack_bits

F32, F16, BF16 = BlockLayout(1, 4), BlockLayout(1, 2), BlockLayout(1, 2)
Q4_0 = BlockLayout(32, 18, factors=(0,))  # d f16 | qs 16
Q4_1 = BlockLayout(32, 20, factors=(0, 2))  # d f16 | m f16 | qs 16
Q5_0 = BlockLayout(32, 22, factors=(0,))  # d f16 | qh 4 (bit 4 of the codes) | qs 16
Q5_1 = BlockLayout(32, 24, factors=(0, 2))  # d f16 | m f16 | qh 4 (bit 4 of the codes) | qs 16
Q8_0 = BlockLayout(32, 34, factors=(0,))  # d f16 | qs 32 int8


def unpack_f32(blocks: Tensor) -> Affine:
    return Affine(fields(blocks, 4)[0].view(torch.float32))


def encode_f32(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    return blocks.view(torch.uint8)


def unpack_f16(blocks: Tensor) -> Affine:
    return Affine(half(*fields(blocks, 2)))


def encode_f16(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    return half_bytes(blocks)


def unpack_bf16(blocks: Tensor) -> Affine:
    return Affine(fields(blocks, 2)[0].view(torch.bfloat16))


def encode_bf16(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    return blocks.bfloat16().view(torch.uint8)


def unpack_q4_0(blocks: Tensor) -> Affine:
    d, qs = fields(blocks, 2, 16)
    return Affine(centered(unpack_bits(qs, 4, run=16), 8), half(d))


def encode_q4_0(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    d = _signed_amax(blocks) / -8
    codes = _truncate(blocks * _inverse(d) + 8.5).clamp_(max=15)
    return pack_q4_0(d, codes)


def pack_q4_0(d: Tensor, codes: Tensor) -> Tensor:
    return torch.cat((half_bytes(d), pack_bits(codes, 4, run=16)), 1)


def unpack_q4_1(blocks: Tensor) -> Affine:
    d, m, qs = fields(blocks, 2, 2, 16)
    return Affine(unpack_bits(qs, 4, run=16), half(d), -half(m))


def encode_q4_1(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    d, m = _step_and_min(blocks, 15)
    codes = _truncate((blocks - m) * _inverse(d) + 0.5).clamp_(max=15)
    return pack_q4_1(d, m, codes)


def pack_q4_1(d: Tensor, m: Tensor, codes: Tensor) -> Tensor:
    return torch.cat((half_bytes(d), half_bytes(m), pack_bits(codes, 4, run=16)), 1)


def unpack_q5_0(blocks: Tensor) -> Affine:
    d, qh, qs = fields(blocks, 2, 4, 16)
    return Affine(centered(_unpack_5_bits(qh, qs), 16), half(d))


def encode_q5_0(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    d = _signed_amax(blocks) / -16
    codes = _truncate(blocks * _inverse(d) + 16.5).clamp_(max=31)
    return pack_q5_0(d, codes)


def pack_q5_0(d: Tensor, codes: Tensor) -> Tensor:
    return torch.cat((half_bytes(d), _pack_5_bits(codes)), 1)


def unpack_q5_1(blocks: Tensor) -> Affine:
    d, m, qh, qs = fields(blocks, 2, 2, 4, 16)
    return Affine(_unpack_5_bits(qh, qs), half(d), -half(m))


def encode_q5_1(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    d, m = _step_and_min(blocks, 31)
    codes = _truncate((blocks - m) * _inverse(d) + 0.5)
    return pack_q5_1(d, m, codes)


def pack_q5_1(d: Tensor, m: Tensor, codes: Tensor) -> Tensor:
    return torch.cat((half_bytes(d), half_bytes(m), _pack_5_bits(codes)), 1)


def unpack_q8_0(blocks: Tensor) -> Affine:
    d, qs = fields(blocks, 2, 32)
    return Affine(qs.view(torch.int8), half(d))


def encode_q8_0(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    d = quotient(blocks.abs().amax(1, keepdim=True), 127)
    codes = _truncate(round_half_away(blocks * _inverse(d)))
    return pack_q8_0(d, codes)


def pack_q8_0(d: Tensor, codes: Tensor) -> Tensor:
    return torch.cat((half_bytes(d), codes.to(torch.int8).view(torch.uint8)), 1)


def round_half_away(x: Tensor) -> Tensor:
    """Round a float32 tensor of any shape as C's `roundf` does, halves away from 0; torch.round takes them to even."""
    whole = x.trunc()
    return (x - whole).mul_(2).trunc_().add_(whole)


def _unpack_5_bits(qh: Tensor, qs: Tensor) -> Tensor:
    return unpack_bits(qs, 4, run=16).add_(unpack_bits(qh, 1, run=1), alpha=16)


def _pack_5_bits(codes: Tensor) -> Tensor:
    high = (codes > 15).to(torch.uint8)
    return torch.cat((pack_bits(high, 1, run=1), pack_bits(codes - 16 * high, 4, run=16)), 1)


def _inverse(d: Tensor) -> Tensor:
    return torch.where(d == 0, d, 1 / d)


def _truncate(codes: Tensor) -> Tensor:
    """Return the integer part, as ggml's cast does. For a subnormal d, 1 / d overflows, which x86 casts to 0."""
    return codes.nan_to_num_(0.0, 0.0, 0.0).trunc_()


def _signed_amax(blocks: Tensor) -> Tensor:
    # ggml's loop starts at +0, which a -0 does not replace. Adding 0 gives an all-zero block the same sign.
    return blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) + 0.0


def _step_and_min(blocks: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    # Not aminmax: of two zeros that differ in sign, ggml keeps the first, and so do min and max with indices.
    low, high = blocks.min(1, keepdim=True).values, blocks.max(1, keepdim=True).values
    return quotient(high - low, steps), low
