"""Codes of 4 and 6 bits in bytes, and the order of block scales that cuBLAS reads.

Source: comfy_kitchen 0.2.40 float_utils.py and tensor/w4a8_packed.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

_TILE_ROWS, _TILE_COLUMNS = 128, 4
_QUARTER = _TILE_ROWS // 4


def pack_nibbles(codes: Tensor, *, high_first: bool = False) -> Tensor:
    """Pack codes of 4 bits, uint8 (n, columns), two to a byte: uint8, (n, columns / 2).

    Args:
        high_first: an even column is in the high bits.
    """
    even, odd = codes[:, 0::2] & 15, codes[:, 1::2] & 15
    return even << 4 | odd if high_first else odd << 4 | even


def unpack_nibbles(packed: Tensor, *, high_first: bool = False) -> Tensor:
    """Undo `pack_nibbles`: uint8 (n, bytes) to uint8 (n, 2 * bytes)."""
    pair = (packed >> 4, packed & 15) if high_first else (packed & 15, packed >> 4)
    return torch.stack(pair, -1).flatten(1)


def unpack_signed_nibbles(packed: Tensor) -> Tensor:
    """Return the codes in bytes as integers from -8 to 7: 8-bit integers (n, bytes) to int8 (n, 2 * bytes)."""
    return (unpack_nibbles(packed.view(torch.uint8)) << 4).view(torch.int8) >> 4


def pack_six_bits(codes: Tensor) -> Tensor:
    """Pack codes of 6 bits, uint8 (n, columns): the low 4 bits of all, then the top 2 bits of all, four to a byte.

    Returns:
        uint8, (n, 3/4 columns).
    """
    top = codes >> 4
    tops = top[:, 0::4] | top[:, 1::4] << 2 | top[:, 2::4] << 4 | top[:, 3::4] << 6
    return torch.cat((pack_nibbles(codes), tops), 1)


def unpack_six_bits(packed: Tensor) -> Tensor:
    """Undo `pack_six_bits`: uint8 (n, bytes) to uint8 (n, 4/3 bytes)."""
    n_low = packed.shape[1] * 2 // 3
    tops = packed[:, n_low:]
    top = torch.stack((tops & 3, tops >> 2 & 3, tops >> 4 & 3, tops >> 6), -1).flatten(1)
    return unpack_nibbles(packed[:, :n_low]) | top << 4


def tiled_shape(rows: int, columns: int) -> tuple[int, int]:
    """Return the shape of block scales, once they are padded to whole tiles."""
    return -(-rows // _TILE_ROWS) * _TILE_ROWS, -(-columns // _TILE_COLUMNS) * _TILE_COLUMNS


def to_tiles(scales: Tensor) -> Tensor:
    """Order block scales, uint8 (rows, columns), as cuBLAS reads them: uint8, of `tiled_shape`.

    A tile of 128 rows and 4 columns is 512 bytes. Row r and column c are at 16 (r % 32) + 4 (r / 32) + c.
    """
    shape = tiled_shape(*scales.shape)
    padded = pad(scales, (0, shape[1] - scales.shape[1], 0, shape[0] - scales.shape[0]))
    tiles = padded.view(-1, 4, _QUARTER, shape[1] // _TILE_COLUMNS, _TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(shape)


def from_tiles(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """Undo `to_tiles`, without the padding: uint8, (rows, columns)."""
    shape = tiled_shape(rows, columns)
    grid = tiles.reshape(-1, shape[1] // _TILE_COLUMNS, _QUARTER, 4, _TILE_COLUMNS)
    return grid.permute(0, 3, 2, 1, 4).reshape(shape)[:rows, :columns]
