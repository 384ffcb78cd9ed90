"""TQ1_0 and TQ2_0: weights -1, 0 and 1 times one float16 for 256 weights.

`dequantize_*`: uint8 (n, type_size) -> float32 (n, 256), bit-exact to ggml. `encode_*` is the inverse, bit-equal to
ggml; ignores `importance`.

Source: ggml-quants.c dequantize_row_tq{1,2}_0, quantize_row_tq{1,2}_0_ref @ ggml 0.15.3; checked against 0.20.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bits import Block, fields, half, pack_bits, unpack_bits
from .legacy import round_half_away

TQ1_0 = Block(256, 54)  # qs 32 + 16 (5 digits of base 3 per byte) | qh 4 (4 digits per byte) | d f16
TQ2_0 = Block(256, 66)  # qs 64 | d f16


def dequantize_tq1_0(blocks: Tensor) -> Tensor:
    *runs, d = fields(blocks, 32, 16, 4, 2)
    codes = torch.cat([_unpack_digits(run, n) for run, n in zip(runs, (5, 5, 4), strict=True)], 1)
    return codes.float().sub_(1).mul_(half(d))


def encode_tq1_0(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    d, codes = _ternary(blocks)
    runs = torch.split(codes, [160, 80, 16], 1)
    return torch.cat([*(_pack_digits(run, n) for run, n in zip(runs, (5, 5, 4), strict=True)), d], 1)


def dequantize_tq2_0(blocks: Tensor) -> Tensor:
    qs, d = fields(blocks, 64, 2)
    return unpack_bits(qs, 2, run=32).float().sub_(1).mul_(half(d))


def encode_tq2_0(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    d, codes = _ternary(blocks)
    return torch.cat((pack_bits(codes, 2, run=32), d), 1)


def _ternary(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(n, 256) float32 -> d (n, 2) uint8 holding float16, codes (n, 256) int32 in [0, 2]."""
    d = blocks.abs().amax(1, keepdim=True)
    inverse = torch.where(d == 0, d, 1 / d)
    return d.half().view(torch.uint8), round_half_away(blocks * inverse).to(torch.int32) + 1


def _unpack_digits(field: Tensor, n_digits: int) -> Tensor:
    """Bytes that are fractions of 256 in base 3: times 3 the integer part is the next digit."""
    fraction, digits = field.to(torch.int32), []
    for _ in range(n_digits):
        fraction = fraction * 3
        digits.append(fraction >> 8)
        fraction = fraction & 255
    return torch.cat(digits, 1)


def _pack_digits(codes: Tensor, n_digits: int) -> Tensor:
    number = torch.zeros_like(codes[:, : codes.shape[1] // n_digits])
    for digit in codes.chunk(n_digits, 1):
        number = number * 3 + digit
    number = number * 3 ** (5 - n_digits)
    # 243 = 3**5 becomes 256, rounded up so that truncation finds the digits again.
    return torch.div(number * 256 + 242, 243, rounding_mode="floor").to(torch.uint8)
