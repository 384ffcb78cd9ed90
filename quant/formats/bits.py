"""Bit fields of packed blocks: a block cut into its fields, small integers in and out of bytes, float16 scales.

ggml packs several small integers into each byte. A run of four bytes of 2-bit integers, for example, holds sixteen:

    byte 0      byte 1      byte 2      byte 3
    12 8 4 0    13 9 5 1    14 10 6 2   15 11 7 3     two bits each, the highest bits on the left

The lowest bits of all bytes come first, then the next ones. One shift and one mask of a whole byte row therefore give
four neighbors. Four bytes are read as one 32-bit word, so that one shift moves all four at once (SWAR, "SIMD within a
register"). It is quicker, and shifts of uint8 do not exist on every backend.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..device import kept


class Block(NamedTuple):
    """The sizes of one block of a ggml type."""

    size: int
    """Elements."""
    nbytes: int
    factors: tuple[int, ...] = ()
    """Byte offsets of the float16 factors in which all of the block's values are linear."""


def fields(blocks: Tensor, *sizes: int) -> tuple[Tensor, ...]:
    """Cut (n, type_size) uint8 into the struct's fields, in order, each (n, size) and contiguous."""
    # Always a copy: a field of a single block counts as contiguous, but is not aligned for a view of wider integers.
    return tuple(part.clone(memory_format=torch.contiguous_format) for part in torch.split(blocks, list(sizes), dim=1))


def half(field: Tensor) -> Tensor:
    """(n, 2 * k) uint8 -> the (n, k) little-endian float16 values, as float32."""
    return field.view(torch.float16).float()


def half_bytes(values: Tensor) -> Tensor:
    """(n, k) floats -> (n, 2 * k) uint8; too large is infinite, as in ggml."""
    return values.half().contiguous().view(torch.uint8)


def quotient(values: Tensor, divisor: float) -> Tensor:
    """values / divisor, rounded once on every device: by a number, CUDA's kernels multiply with the inverse."""
    return values / torch.full_like(values, divisor)


def unpack_bits(field: Tensor, bits: int, run: int) -> Tensor:
    """Read unsigned integers of `bits` bits that ggml stores in runs of `run` bytes.

    A run holds 8 / bits groups of `run` integers: the lowest bits of every byte first, then the next ones.

    Args:
        field: (n, k * run) uint8, contiguous.

    Returns:
        uint8, (n, 8 / bits * k * run).
    """
    mask = 0x01010101 * ((1 << bits) - 1)
    swar = run % 4 == 0
    words = field.view(torch.int32) if swar else field.int()
    words = words.view(len(field), -1, run // 4 if swar else run)
    groups = torch.stack([(words >> shift) & mask for shift in range(0, 8, bits)], dim=2)
    return (groups.view(torch.uint8) if swar else groups.to(torch.uint8)).reshape(len(field), -1)


def pack_bits(values: Tensor, bits: int, run: int) -> Tensor:
    """Inverse of `unpack_bits`: (n, 8 / bits * k * run) integers below 2**bits, of any dtype -> (n, k * run) uint8."""
    swar = run % 4 == 0
    codes = values.to(torch.uint8).contiguous()
    words = codes.view(torch.int32) if swar else codes.int()
    groups = words.view(len(values), -1, 8 // bits, run // 4 if swar else run)
    packed = groups[:, :, 0].clone()
    for index in range(1, 8 // bits):
        packed |= groups[:, :, index] << (bits * index)
    return (packed.view(torch.uint8) if swar else packed.to(torch.uint8)).reshape(len(values), -1)


def lookup(codes: Tensor, values: tuple[int, ...]) -> Tensor:
    """uint8 codes -> the float32 values they stand for."""
    # On a CPU index_select along one axis is four times as fast as indexing with a matrix.
    return _table(values, codes.device).index_select(0, codes.int().view(-1)).view(codes.shape)


@kept
def _table(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)
