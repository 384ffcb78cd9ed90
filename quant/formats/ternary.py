"""TQ1_0 and TQ2_0: weights of -1, 0 and 1, with one float16 factor for 256 weights.

`unpack_*` takes blocks, uint8 (n, type_size), and returns what their weights consist of, bit-exact to ggml.

`encode_*` takes float32 (n, 256) and returns uint8 (n, type_size), bit-equal to ggml; `importance` is ignored.

Source: ggml-quants.c dequantize_row_tq{1,2}_0, quantize_row_tq{1,2}_0_ref @ ggml 0.15.3; checked against 0.20.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bits import Affine, BlockLayout, centered, fields, half, pack_bits, unpack_bits
from .legacy import round_half_away

TQ1_0 = BlockLayout(256, 54)  # qs 32 + 16 (5 digits of base 3 per byte) | qh 4 (4 digits per byte) | d f16
TQ2_0 = BlockLayout(256, 66)  # qs 64 | d f16


def unpack_tq1_0(blocks: Tensor) -> Affine:
    *runs, d = fields(blocks, 32, 16, 4, 2)
    codes = torch.cat([_unpack_digits(run, n) for run, n in zip(runs, (5, 5, 4), strict=True)], 1)
    return Affine(centered(codes, 1), half(d))


def encode_tq1_0(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    d, codes = _ternary(blocks)
    runs = torch.split(codes, [160, 80, 16], 1)
    return torch.cat([*(_pack_digits(run, n) for run, n in zip(runs, (5, 5, 4), strict=True)), d], 1)


def unpack_tq2_0(blocks: Tensor) -> Affine:
    qs, d = fields(blocks, 64, 2)
    return Affine(centered(unpack_bits(qs, 2, run=32), 1), half(d))


def encode_tq2_0(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    d, codes = _ternary(blocks)
    return torch.cat((pack_bits(codes, 2, run=32), d), 1)


def _ternary(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bytes of d, uint8 (n, 2), and the codes, int32 (n, 256) from 0 to 2, of float32 (n, 256)."""
    d = blocks.abs().amax(1, keepdim=True)
    inverse = torch.where(d == 0, d, 1 / d)
    return d.half().view(torch.uint8), round_half_away(blocks * inverse).to(torch.int32) + 1


def _unpack_digits(field: Tensor, n_digits: int) -> Tensor:
    """Read base-3 digits from bytes, uint8 (n, k) -> uint8 (n, n_digits * k).

    A byte is a fraction in units of 1/256. Three times the fraction has the next digit as its integer part.
    """
    fraction, digits = field.to(torch.int16), []
    for _ in range(n_digits):
        fraction = fraction * 3
        digits.append((fraction >> 8).to(torch.uint8))
        fraction = fraction & 255
    return torch.cat(digits, 1)


def _pack_digits(codes: Tensor, n_digits: int) -> Tensor:
    """Write base-3 digits as `_unpack_digits` reads them, int32 (n, n_digits * k) -> uint8 (n, k)."""
    number = torch.zeros_like(codes[:, : codes.shape[1] // n_digits])
    for digit in codes.chunk(n_digits, 1):
        number = number * 3 + digit
    number = number * 3 ** (5 - n_digits)
    # A fraction of 243 = 3**5 becomes one of 256, rounded up so that truncation finds the digits again.
    return torch.div(number * 256 + 242, 243, rounding_mode="floor").to(torch.uint8)
