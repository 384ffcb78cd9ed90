"""I8, I16, I32, I64 and F64: numbers that some files have beside the weights, such as position ids. Read only.

`dequantize_*`: uint8 (n, type_size) -> float32 (n, 1), the nearest number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bits import BlockLayout, fields

I8, I16, I32, I64, F64 = (BlockLayout(1, nbytes) for nbytes in (1, 2, 4, 8, 8))


def dequantize_i8(blocks: Tensor) -> Tensor:
    return fields(blocks, 1)[0].view(torch.int8).float()


def dequantize_i16(blocks: Tensor) -> Tensor:
    return fields(blocks, 2)[0].view(torch.int16).float()


def dequantize_i32(blocks: Tensor) -> Tensor:
    return fields(blocks, 4)[0].view(torch.int32).float()


def dequantize_i64(blocks: Tensor) -> Tensor:
    return fields(blocks, 8)[0].view(torch.int64).float()


def dequantize_f64(blocks: Tensor) -> Tensor:
    return fields(blocks, 8)[0].view(torch.float64).float()
