"""Bytes of packed codes and tiles, from the description of the layout."""

from __future__ import annotations

import pytest
import torch

from wanquant.quant.native.packing import (
    from_tiles,
    pack_nibbles,
    pack_six_bits,
    to_tiles,
    unpack_nibbles,
    unpack_six_bits,
)


def codes(rows, columns, top):
    return torch.randint(0, top, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("high_first", [False, True])
def test_nibbles(high_first):
    expected = codes(3, 8, 16)
    packed = pack_nibbles(expected, high_first=high_first)
    even, odd = (4, 0) if high_first else (0, 4)
    assert all(packed[r, c // 2] >> (odd if c % 2 else even) & 15 == expected[r, c] for r in range(3) for c in range(8))
    assert torch.equal(unpack_nibbles(packed, high_first=high_first), expected)


def test_six_bits():
    expected = codes(3, 32, 64)
    packed = pack_six_bits(expected)
    for row in range(3):
        for column in range(32):
            low = packed[row, column // 2] >> 4 * (column % 2) & 15
            high = packed[row, 16 + column // 4] >> 2 * (column % 4) & 3
            assert low + 16 * high == expected[row, column]
    assert torch.equal(unpack_six_bits(packed), expected)


@pytest.mark.parametrize("shape", [(1, 1), (128, 4), (130, 9), (300, 16)])
def test_tiles(shape):
    expected = codes(*shape, 256)
    tiles = to_tiles(expected)
    n_tiles = tiles.shape[1] // 4
    for r, c in ((0, 0), (shape[0] - 1, shape[1] - 1), (shape[0] // 2, shape[1] // 2)):
        at = 512 * (r // 128 * n_tiles + c // 4) + r % 32 * 16 + r % 128 // 32 * 4 + c % 4
        assert tiles.flatten()[at] == expected[r, c]
    assert torch.equal(from_tiles(tiles, *shape), expected)
