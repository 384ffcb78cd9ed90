"""The parts of a packed block: its fields, the small integers in its bytes, and its float16 factors.

ggml packs several small integers into each byte. A run of four bytes, for example, holds sixteen integers of two bits.
Here are their positions in the sequence, in each byte from the highest bits to the lowest:

    byte 0      byte 1      byte 2      byte 3
    12 8 4 0    13 9 5 1    14 10 6 2   15 11 7 3

The lowest bits of all bytes come first in the sequence, then the next bits. One shift and one mask of all four bytes
therefore give four neighbors of the sequence. Four bytes are read as one 32-bit word, so that a single operation works
on all of them (SWAR, "SIMD within a register"). This is faster, and not every backend can shift uint8.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..device import cached_on_device


class BlockLayout(NamedTuple):
    """The size of a ggml type's block, and where its factors are."""

    size: int
    """The number of elements."""
    nbytes: int
    factors: tuple[int | tuple[int, ...], ...] = ()
    """Byte offsets of the float16 factors. All values of a block are linear in these.

    Four offsets are those of the bytes whose highest four bits hold a factor, its lowest bits first.
    """


def read_factor(blocks: Tensor, place: int | tuple[int, ...]) -> Tensor:
    """Read a float16 factor of blocks, uint8 (n, type_size): float32 (n, 1)."""
    if isinstance(place, int):
        return half(blocks[:, place : place + 2].contiguous())
    nibbles = blocks[:, list(place)].int() >> 4
    return half((nibbles[:, ::2] | nibbles[:, 1::2] << 4).to(torch.uint8))


def write_factor(blocks: Tensor, place: int | tuple[int, ...], values: Tensor) -> None:
    """Write a float16 factor, floats (n, 1), into blocks, uint8 (n, type_size)."""
    field = half_bytes(values)
    if isinstance(place, int):
        blocks[:, place : place + 2] = field
        return
    nibbles = torch.stack((field & 15, field.int() >> 4), 2).view(len(blocks), 4)
    blocks[:, list(place)] = (blocks[:, list(place)] & 15) | (nibbles << 4).to(torch.uint8)


def fields(blocks: Tensor, *sizes: int) -> tuple[Tensor, ...]:
    """Cut blocks, uint8 (n, type_size), into the fields of the struct, in order: uint8 (n, size) each, contiguous."""
    # Always copies. A field of a single block counts as contiguous, but it is not aligned for a view as wider integers.
    return tuple(part.clone(memory_format=torch.contiguous_format) for part in torch.split(blocks, list(sizes), dim=1))


def half(field: Tensor) -> Tensor:
    """Read little-endian float16 values: uint8 (n, 2 * k) -> float32 (n, k)."""
    return field.view(torch.float16).float()


def half_bytes(values: Tensor) -> Tensor:
    """Write float16 values: floats (n, k) -> uint8 (n, 2 * k). As in ggml, too large values become infinite."""
    return values.half().contiguous().view(torch.uint8)


def quotient(values: Tensor, divisor: float) -> Tensor:
    """Divide a float tensor of any shape by a number and round once.

    CUDA's division by a number multiplies with its reciprocal instead, which rounds twice.
    """
    return values / torch.full_like(values, divisor)


def unpack_bits(field: Tensor, bits: int, run: int) -> Tensor:
    """Read unsigned integers of `bits` bits, which ggml stores in runs of `run` bytes.

    A run holds 8 / bits groups of `run` integers. The lowest bits of all bytes are the first group, and so on.

    Args:
        field: uint8 (n, k * run), contiguous.

    Returns:
        uint8 (n, 8 / bits * k * run).
    """
    mask = 0x01010101 * ((1 << bits) - 1)
    swar = run % 4 == 0
    words = field.view(torch.int32) if swar else field.int()
    words = words.view(len(field), -1, run // 4 if swar else run)
    groups = torch.stack([(words >> shift) & mask for shift in range(0, 8, bits)], dim=2)
    return (groups.view(torch.uint8) if swar else groups.to(torch.uint8)).reshape(len(field), -1)


def pack_bits(values: Tensor, bits: int, run: int) -> Tensor:
    """Write integers as `unpack_bits` reads them.

    Args:
        values: integers below 2**bits of any dtype, (n, 8 / bits * k * run).

    Returns:
        uint8 (n, k * run).
    """
    swar = run % 4 == 0
    # Flat, because a matrix of one row may have any stride, which a view as another dtype would refuse.
    codes = values.to(torch.uint8).reshape(-1)
    words = codes.view(torch.int32) if swar else codes.int()
    groups = words.view(len(values), -1, 8 // bits, run // 4 if swar else run)
    packed = groups[:, :, 0].clone()
    for index in range(1, 8 // bits):
        packed |= groups[:, :, index] << (bits * index)
    return (packed.view(torch.uint8) if swar else packed.to(torch.uint8)).reshape(len(values), -1)


def lookup(codes: Tensor, values: tuple[int, ...]) -> Tensor:
    """Return the entry of a codebook for each code: uint8 of any shape -> float32 of the same shape."""
    # On a CPU, index_select along one axis is four times as fast as indexing with a matrix.
    return _table(values, codes.device).index_select(0, codes.int().view(-1)).view(codes.shape)


@cached_on_device
def _table(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)
