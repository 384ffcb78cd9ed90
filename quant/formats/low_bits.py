"""Q1_0 and Q2_0: codes of one or two bits times one float16. Read only.

`dequantize_*`: uint8 (n, type_size) -> float32 (n, block_size), bit-exact to ggml.

Source: ggml-quants.c dequantize_row_q{1,2}_0, struct block_q{1,2}_0 in ggml-common.h @ ggml 0.20.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bits import BlockLayout, centered, fields, half, unpack_bits

Q1_0 = BlockLayout(128, 18)  # d f16 | qs 16 (the sign of each element)
Q2_0 = BlockLayout(64, 18)  # d f16 | qs 16


def dequantize_q1_0(blocks: Tensor) -> Tensor:
    d, qs = fields(blocks, 2, 16)
    return torch.where(unpack_bits(qs, 1, run=1) > 0, half(d), -half(d))


def dequantize_q2_0(blocks: Tensor) -> Tensor:
    d, qs = fields(blocks, 2, 16)
    return centered(unpack_bits(qs, 2, run=1), 1).mul_(half(d))
