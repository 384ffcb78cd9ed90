"""I8, I16, I32, I64 and F64: numbers that some files have beside the weights, such as position ids. Read only.

`unpack_*` takes uint8 (n, type_size), and returns numbers (n, 1), of which the weights are the nearest float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bits import Affine, BlockLayout, fields

I8, I16, I32, I64, F64 = (BlockLayout(1, nbytes) for nbytes in (1, 2, 4, 8, 8))


def unpack_i8(blocks: Tensor) -> Affine:
    return Affine(fields(blocks, 1)[0].view(torch.int8))


def unpack_i16(blocks: Tensor) -> Affine:
    return Affine(fields(blocks, 2)[0].view(torch.int16))


def unpack_i32(blocks: Tensor) -> Affine:
    return Affine(fields(blocks, 4)[0].view(torch.int32))


def unpack_i64(blocks: Tensor) -> Affine:
    return Affine(fields(blocks, 8)[0].view(torch.int64))


def unpack_f64(blocks: Tensor) -> Affine:
    return Affine(fields(blocks, 8)[0].view(torch.float64))
