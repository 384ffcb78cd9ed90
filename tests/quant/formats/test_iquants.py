"""IQ1, IQ2 and IQ3: every row of each grid occurs, blocks of ggml dequantize correctly, tables are made once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from wanquant.quant import QTYPES
from wanquant.quant.formats import iquants
from wanquant.testing.libggml import LibGGML
from wanquant.tests.quant.samples import assert_same_bits, random_blocks, weights

NAMES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
names = pytest.mark.parametrize("name", NAMES)


@names
def test_random_blocks_reach_every_row_of_the_grid(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[torch.Tensor] = []
    lookup = iquants._grid
    monkeypatch.setattr(iquants, "_grid", lambda name, index: (rows.append(index), lookup(name, index))[1])
    QTYPES[name].dequantize_blocks(random_blocks(QTYPES[name], 2000))
    assert torch.cat(rows).unique().numel() == quants._type_traits[GGMLQuantizationType[name]].grid_shape[0]


@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ3_XXS", "IQ3_S"])  # ggml takes seconds to prepare for the others
def test_blocks_encoded_by_ggml_dequantize_to_its_bits(name: str, libggml: LibGGML) -> None:
    weight = weights("gaussian", 256)[:8]
    packed = libggml.quantize(name, weight, np.ones(weight.shape[1], np.float32))
    restored = QTYPES[name].dequantize(torch.from_numpy(packed)).numpy()
    assert_same_bits(restored, libggml.dequantize(name, packed))
    assert 0.1 < np.linalg.norm(restored - weight) / np.linalg.norm(weight) < 0.4


@names
def test_packed_levels_are_exact(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    grid = iquants.grid_entries(name, torch.device("cpu"))
    levels = grid[torch.randint(len(grid), (400 * 256 // grid.shape[1],), generator=generator)].view(400, 32, 8)
    if name.startswith("IQ1"):
        run = 32 if name == "IQ1_S" else 8
        delta = torch.randint(2, (400, 256 // run, 1), generator=generator) * 0.25 - 0.125
        levels = levels.view(400, -1, run) + delta
    else:
        signs = torch.randint(2, (400, 32, 8), generator=generator) * 2.0 - 1
        if name in ("IQ2_XXS", "IQ2_XS", "IQ3_XXS"):
            signs[..., 7] *= signs.prod(2)
        levels = levels * signs
    levels = levels.view(400, 256)
    size, largest = (16 if name in ("IQ1_M", "IQ2_XS", "IQ2_S") else 32), (8 if name.startswith("IQ1") else 16)
    scales = 2.0 * torch.randint(largest, (400, 256 // size), generator=generator) + 1
    d = torch.randn(400, generator=generator).half().float()
    packed = getattr(iquants, f"pack_{name.lower()}")(d, scales, levels)
    factors = (d[:, None] * iquants.UNITS[name] * scales).repeat_interleave(size, 1)
    assert torch.equal(QTYPES[name].dequantize_blocks(packed), factors * levels)


def test_tables_are_made_once() -> None:
    device = torch.device("cpu")
    for name in NAMES:
        assert iquants._grid_table(name, device) is iquants._grid_table(name, device)
    assert iquants._even_signs(device) is iquants._even_signs(device)


def test_signs_are_the_bits_of_their_index() -> None:
    signs = iquants._signs(torch.device("cpu"))
    assert signs[0b10000001].tolist() == [-1, 1, 1, 1, 1, 1, 1, -1]
    even = iquants._even_signs(torch.device("cpu"))
    assert even.shape == (128, 8)
    assert torch.equal(even[:, :7], signs[:128, :7])
    assert (even.prod(1) == 1).all()
