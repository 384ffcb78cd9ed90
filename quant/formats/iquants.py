"""IQ1, IQ2 and IQ3: eight or four weights at a time are a row of a fixed grid, with signs and scales.

`unpack_*` takes blocks, uint8 (n, type_size), and returns what their weights consist of. This is bit-exact to ggml in
any order of the factors, because float32 holds every product of a block exactly.

`pack_*` writes blocks, uint8 (n, type_size), from their factors. A weight is `UNITS[name] * d * scale * level`. `d` are
floats (n,). `scales`, float32 (n, sub-blocks), are 2 * s + 1 for the stored s. `levels`, float32 (n, 256), are entries
of the grid with their signs, and in IQ1 with the delta.

Source: ggml-quants.c dequantize_row_iq{1_s,1_m,2_xxs,2_xs,2_s,3_xxs,3_s}, ggml-common.h @ ggml 0.15.3; checked against
0.20.2. The grids are those of the gguf package.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding

from ..device import cached_on_device
from .bits import Affine, BlockLayout, fields, half, half_bytes, pack_bits, unpack_bits

# d f16 | qs 32 | qh 8 u16 (4 x 3 bits of grid row, 3 bits of scale, sign of delta)
IQ1_S = BlockLayout(256, 50, factors=(0,))
# qs 32 | qh 16 (2 x 3 bits of grid row, sign of delta) | scales 4 u16 (4 x 3 bits, 4 of d)
IQ1_M = BlockLayout(256, 56, factors=((49, 51, 53, 55),))
# d f16 | 8 x (qs 4 | signs and scale u32)
IQ2_XXS = BlockLayout(256, 66, factors=(0,))
# d f16 | qs 32 u16 (9 bits of grid row, 7 bits of signs) | scales 8
IQ2_XS = BlockLayout(256, 74, factors=(0,))
# d f16 | qs 32 | signs 32 | qh 8 | scales 8
IQ2_S = BlockLayout(256, 82, factors=(0,))
# d f16 | qs 64 | signs and scale 8 u32
IQ3_XXS = BlockLayout(256, 98, factors=(0,))
# d f16 | qs 64 | qh 8 | signs 32 | scales 4
IQ3_S = BlockLayout(256, 110, factors=(0,))

UNITS = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ3_S"), 1.0),
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S"), 1 / 8),
    "IQ3_XXS": 1 / 4,
}
"""The fixed factor of each type's weights, see the top of this module."""

GRID_WEIGHTS = {name: 4 if name.startswith("IQ3") else 8 for name in UNITS}
"""The number of weights in a row of each type's grid."""


def unpack_iq1_s(blocks: Tensor) -> Affine:
    d, qs, qh = fields(blocks, 2, 32, 16)
    words = qh.view(torch.int16).int()
    grid = _grid("IQ1_S", qs.int().add_(_bits(words, 3, 4), alpha=256))
    delta = torch.where(words < 0, -0.125, 0.125)
    return _scaled(grid.view(-1, 8, 32).add_(delta[:, :, None]), half(d), 2 * (words >> 12 & 7) + 1)


def unpack_iq1_m(blocks: Tensor) -> Affine:
    qs, qh, scales = fields(blocks, 32, 16, 8)
    high = unpack_bits(qh, 4, run=1)
    grid = _grid("IQ1_M", qs.int().add_(high & 7, alpha=256))
    delta = torch.where(high > 7, -0.125, 0.125)
    d = unpack_bits(scales, 4, run=1)[:, 3::4]  # the highest four bits of each 16-bit word
    d = d[:, ::2] + 16 * d[:, 1::2]
    return _scaled(grid.add_(delta[:, :, None]), half(d), 2 * _bits(scales.view(torch.int16).int(), 3, 4) + 1)


def unpack_iq2_xxs(blocks: Tensor) -> Affine:
    d, groups = fields(blocks, 2, 64)
    qs, words = fields(groups.view(-1, 8), 4, 4)
    signs, scale = _signs_and_scale(words.view(torch.int32).view(-1, 8))
    return _scaled(_grid("IQ2_XXS", qs.view(-1, 32).int()) * signs, half(d) / 4, scale)


def unpack_iq2_xs(blocks: Tensor) -> Affine:
    d, qs, scales = fields(blocks, 2, 64, 8)
    words = qs.view(torch.int16).int()
    signs = embedding(words >> 9 & 127, _even_signs(blocks.device))
    return _scaled(_grid("IQ2_XS", words & 511) * signs, half(d) / 4, unpack_bits(scales, 4, run=1) + 0.5)


def unpack_iq2_s(blocks: Tensor) -> Affine:
    d, qs, sign_bits, qh, scales = fields(blocks, 2, 32, 32, 8, 8)
    grid = _grid("IQ2_S", qs.int().add_(unpack_bits(qh, 2, run=1), alpha=256))
    signs = embedding(sign_bits.int(), _signs(blocks.device))
    return _scaled(grid * signs, half(d) / 4, unpack_bits(scales, 4, run=1) + 0.5)


def unpack_iq3_xxs(blocks: Tensor) -> Affine:
    d, qs, words = fields(blocks, 2, 64, 32)
    signs, scale = _signs_and_scale(words.view(torch.int32))
    return _scaled(_grid("IQ3_XXS", qs.int()).view(-1, 32, 8) * signs, half(d) / 2, scale)


def unpack_iq3_s(blocks: Tensor) -> Affine:
    d, qs, qh, sign_bits, scales = fields(blocks, 2, 64, 8, 32, 4)
    grid = _grid("IQ3_S", qs.int().add_(unpack_bits(qh, 1, run=1), alpha=256))
    signs = embedding(sign_bits.int(), _signs(blocks.device))
    return _scaled(grid.view(-1, 32, 8) * signs, half(d), 2 * unpack_bits(scales, 4, run=1) + 1)


def _bits(words: Tensor, bits: int, count: int) -> Tensor:
    """Read the `count` lowest fields of `bits` bits from each word: int32 (n, k) -> int32 (n, count * k)."""
    mask = (1 << bits) - 1
    return torch.stack([words >> bits * i & mask for i in range(count)], 2).view(len(words), -1)


def _signs_and_scale(words: Tensor) -> tuple[Tensor, Tensor]:
    """Split words, int32 (n, 8), into 4 x 7 bits of signs and 4 bits of scale.

    Returns:
        The signs, float32 (n, 32, 8), and the scales, float32 (n, 8).
    """
    return embedding(_bits(words, 7, 4), _even_signs(words.device)), (words >> 28 & 15) + 0.5


def _scaled(weights: Tensor, d: Tensor, scales: Tensor) -> Affine:
    """Return 256 weights of each block with their scales, (n, k), and their factor d, (n, 1)."""
    return Affine(weights.view(-1, 256), d * scales)


def _grid(name: str, rows: Tensor) -> Tensor:
    """Look up rows of a type's grid: int32 (n, k) -> float32 (n, k, 4 or 8)."""
    return embedding(rows, _grid_table(name, rows.device))


def grid_entries(name: str, device: torch.device) -> Tensor:
    """Return the grid of a type, float32 (rows, 4 or 8), of magnitudes; IQ1's entries have signs, but no delta."""
    return _grid_table(name, device).view(-1, GRID_WEIGHTS[name])


@cached_on_device
def _grid_table(name: str, device: torch.device) -> Tensor:
    return grid(name).to(device)


def grid(name: str) -> Tensor:
    """Return a type's grid of integers, float32 (rows, 4 or 8), on the CPU."""
    # Not imported at the top: the package takes as long to import as all of this one, and few files have these types.
    import gguf.quants

    source = getattr(gguf.quants, name)
    source.init_grid()
    return torch.from_numpy(source.grid).view(source.grid_shape)


@cached_on_device
def _signs(device: torch.device) -> Tensor:
    """Return the signs of eight weights for each byte, float32 (256, 8): -1 where the bit is set, else 1."""
    return 1 - 2.0 * (torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1)


@cached_on_device
def _even_signs(device: torch.device) -> Tensor:
    """Return eight signs for each seven bits, float32 (128, 8): the eighth makes the number of minus signs even."""
    signs = _signs(device)[:128].clone()
    signs[:, 7] = signs[:, :7].prod(1)
    return signs


def pack_iq1_s(d: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    rows, delta = _rows_and_deltas("IQ1_S", levels)
    words = _join(rows.view(-1, 8, 4) >> 8, 3) | _stored(scales) << 12 | delta[:, ::4] << 15
    return torch.cat((half_bytes(d[:, None]), _bytes(rows, 1), _bytes(words, 2)), 1)


def pack_iq1_m(d: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    rows, delta = _rows_and_deltas("IQ1_M", levels)
    words = _join(_stored(scales).view(-1, 4, 4), 3) | _quarters(d) << 12
    return torch.cat((_bytes(rows, 1), pack_bits(rows >> 8 | delta << 3, 4, run=1), _bytes(words, 2)), 1)


def pack_iq2_xxs(d: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    rows = _bytes(_rows("IQ2_XXS", levels.abs()), 1).view(-1, 8, 4)
    groups = torch.cat((rows, _signs_and_scale_bytes(scales, levels).view(-1, 8, 4)), 2)
    return torch.cat((half_bytes(d[:, None]), groups.view(len(d), 64)), 1)


def pack_iq2_xs(d: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    words = _rows("IQ2_XS", levels.abs()) | (_minus(levels) & 127) << 9
    return torch.cat((half_bytes(d[:, None]), _bytes(words, 2), pack_bits(_stored(scales), 4, run=1)), 1)


def pack_iq2_s(d: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    rows = _rows("IQ2_S", levels.abs())
    low, high = _bytes(rows, 1), pack_bits(rows >> 8, 2, run=1)
    return torch.cat(
        (half_bytes(d[:, None]), low, _bytes(_minus(levels), 1), high, pack_bits(_stored(scales), 4, run=1)), 1
    )


def pack_iq3_xxs(d: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    rows = _rows("IQ3_XXS", levels.abs())
    return torch.cat((half_bytes(d[:, None]), _bytes(rows, 1), _signs_and_scale_bytes(scales, levels)), 1)


def pack_iq3_s(d: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    rows = _rows("IQ3_S", levels.abs())
    low, high = _bytes(rows, 1), pack_bits(rows >> 8, 1, run=1)
    return torch.cat(
        (half_bytes(d[:, None]), low, high, _bytes(_minus(levels), 1), pack_bits(_stored(scales), 4, run=1)), 1
    )


def _stored(scales: Tensor) -> Tensor:
    """Return the integers that odd scales are stored as, int64 of the same shape."""
    return scales.long() >> 1


def _rows_and_deltas(name: str, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the grid row and whether the delta is negative for each 8 weights of IQ1, int64 (n, 32)."""
    entries = levels.round()
    return _rows(name, entries), (levels < entries)[:, ::8].long()


def _rows(name: str, entries: Tensor) -> Tensor:
    """Find grid rows by their entries: float32 (n, 256) -> int64 (n, 256 / 4 or 8)."""
    digits, numbers = _row_table(name, entries.device)
    code, *rest = digits.index_select(0, entries.flatten().add(1).long()).view(-1, GRID_WEIGHTS[name]).unbind(1)
    for digit in rest:
        code = code * (int(digits[-1]) + 1) + digit
    return numbers.index_select(0, code).view(len(entries), -1)


@cached_on_device
def _row_table(name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the digit of each level from -1 to the highest, and the grid row of each number of such digits, int64."""
    grid = grid_entries(name, torch.device("cpu")).numpy()
    levels, digits = np.unique(grid, return_inverse=True)
    numbers = np.zeros([len(levels)] * grid.shape[1], np.int64)
    numbers[tuple(digits.reshape(grid.shape).T)] = np.arange(len(grid))
    of_levels = np.searchsorted(levels, np.arange(-1, levels[-1] + 1))
    return torch.from_numpy(of_levels).to(device), torch.from_numpy(numbers.reshape(-1)).to(device)


def _minus(levels: Tensor) -> Tensor:
    """Return one bit for each of eight signs, set where it is minus: (n, 256) -> int64 (n, 32)."""
    return pack_bits(levels < 0, 1, run=1).long()


def _signs_and_scale_bytes(scales: Tensor, levels: Tensor) -> Tensor:
    """Write words as `_signs_and_scale` reads them, uint8 (n, 32)."""
    return _bytes(_join(_minus(levels).view(-1, 8, 4) & 127, 7) | _stored(scales) << 28, 4)


def _quarters(d: Tensor) -> Tensor:
    """Return the four bits of each quarter of float16 values, lowest first: floats (n,) -> int64 (n, 4)."""
    bits = half_bytes(d[:, None]).view(torch.int16).long()
    return torch.cat([bits >> shift & 15 for shift in (0, 4, 8, 12)], 1)


def _join(values: Tensor, bits: int) -> Tensor:
    """Join k fields of `bits` bits in one word, the first of them lowest: int64 (n, m, k) -> (n, m)."""
    words = torch.zeros_like(values[:, :, 0])
    for index, field in enumerate(values.unbind(2)):
        words = words | field << bits * index
    return words


def _bytes(words: Tensor, count: int) -> Tensor:
    """Write the `count` lowest bytes of each word, lowest first: int64 (n, k) -> uint8 (n, k * count)."""
    return torch.stack([words >> 8 * index & 255 for index in range(count)], 2).to(torch.uint8).view(len(words), -1)
