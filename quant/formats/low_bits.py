"""Q1_0 and Q2_0: codes of one or two bits times one float16. Read only.

`unpack_*` takes blocks, uint8 (n, type_size), and returns what their weights consist of, bit-exact to ggml.

Source: ggml-quants.c dequantize_row_q{1,2}_0, struct block_q{1,2}_0 in ggml-common.h @ ggml 0.20.2.
"""

from __future__ import annotations

from torch import Tensor

from .bits import Affine, BlockLayout, centered, fields, half, unpack_bits

Q1_0 = BlockLayout(128, 18)  # d f16 | qs 16 (the sign of each element)
Q2_0 = BlockLayout(64, 18)  # d f16 | qs 16


def unpack_q1_0(blocks: Tensor) -> Affine:
    d, qs = fields(blocks, 2, 16)
    return Affine(centered(unpack_bits(qs, 1, run=1).mul_(2), 1), half(d))


def unpack_q2_0(blocks: Tensor) -> Affine:
    d, qs = fields(blocks, 2, 16)
    return Affine(centered(unpack_bits(qs, 2, run=1), 1), half(d))
