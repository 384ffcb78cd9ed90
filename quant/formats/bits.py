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

from collections.abc import Iterator
from itertools import repeat
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from ..device import cached_on_device


class Affine(NamedTuple):
    """Blocks whose weights are code * scale - min, with a scale and a min for each sub-block."""

    codes: Tensor
    """Integers or floats, (n, block_size)."""
    scales: Tensor | None = None
    """float32 (n, sub-blocks); None if the codes are the weights."""
    mins: Tensor | None = None
    """Like `scales`, or None for zeros."""

    def weights(self) -> Tensor:
        """Return the weights, float32 (n, block_size), which may be written over the codes."""
        weights = self.codes.float()
        if self.scales is None:
            return weights
        sub_blocks = weights.view(*self.scales.shape, -1).mul_(self.scales[:, :, None])
        if self.mins is not None:
            # Two operations: a fused multiply-add would round differently.
            sub_blocks.sub_(self.mins[:, :, None])
        return weights

    def split(self, n_blocks: int) -> Iterator[Affine]:
        """Return parts of at most `n_blocks` blocks, in order."""
        scales = repeat(None) if self.scales is None else torch.split(self.scales, n_blocks)
        mins = repeat(None) if self.mins is None else torch.split(self.mins, n_blocks)
        return map(Affine, torch.split(self.codes, n_blocks), scales, mins)


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
    # Two bytes at a time where all places are even, which is faster. A storage may begin at an odd address, too.
    wide = gcd(*sizes, blocks.stride(0), blocks.storage_offset(), blocks.data_ptr()) % 2 == 0
    source, width = (blocks.view(torch.int16), 2) if wide else (blocks, 1)
    parts = torch.split(source, [size // width for size in sizes], dim=1)
    # Always copies. A field of a single block counts as contiguous, but it is not aligned for a view as wider integers.
    return tuple(part.clone(memory_format=torch.contiguous_format).view(torch.uint8) for part in parts)


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
        run: 1, which is looked up, or a multiple of 4.

    Returns:
        uint8 (n, 8 / bits * k * run).
    """
    n = len(field)
    if run == 1:
        words = _codes_of_bytes(bits, field.device).index_select(0, field.int().view(-1))
        return words.view(torch.uint8).view(n, -1)
    words, mask = field.view(torch.int32), 0x01010101 * ((1 << bits) - 1)
    groups = [words & mask, *((words >> shift) & mask for shift in range(bits, 8, bits))]
    # As bytes, because torch copies those of a run at once, which only pays for more than eight.
    unit = torch.int64 if run == 8 else torch.uint8
    parts = [group.view(unit).view(n, -1, run // unit.itemsize) for group in groups]
    return torch.stack(parts, dim=2).view(torch.uint8).view(n, -1)


@cached_on_device
def _codes_of_bytes(bits: int, device: torch.device) -> Tensor:
    """Return the codes in each byte, the lowest bits first, as the bytes of one integer: (256,)."""
    shifts = torch.arange(0, 8, bits)
    codes = (torch.arange(256)[:, None] >> shifts & ((1 << bits) - 1)).to(torch.uint8)
    return codes.view({1: torch.int64, 2: torch.int32, 4: torch.int16}[bits]).view(-1).to(device)


def centered(codes: Tensor, middle: int) -> Tensor:
    """Subtract the code that stands for 0, in place: uint8 -> int8 of the same shape."""
    return codes.view(torch.int8).sub_(middle)


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
    """Return the entry of a codebook for each code.

    Args:
        codes: of four bits, uint8 (..., 2 * k), contiguous.

    Returns:
        float32, of the same shape.
    """
    # Two codes at a time. On a CPU, index_select along one axis is four times as fast as indexing with a matrix.
    pairs = codes.view(torch.int16)
    entries = _pairs(values, codes.device).index_select(0, ((pairs >> 4 | pairs) & 255).int().view(-1))
    return entries.view(torch.float32).view(codes.shape)


@cached_on_device
def _pairs(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Return both entries of each pair of codes, the first of which is the lower bits, as an integer: int64 (256,)."""
    low, high = torch.arange(256) & 15, torch.arange(256) >> 4
    pairs = torch.tensor(values, dtype=torch.float32)[torch.stack((low, high), 1)]
    return pairs.view(torch.int64).view(-1).to(device)
