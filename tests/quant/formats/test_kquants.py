"""K-quants: `pack_*` writes the fields where ggml reads them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from wanquant.quant import QTYPES
from wanquant.quant.formats import kquants
from wanquant.testing.libggml import LibGGML
from wanquant.tests.quant.samples import assert_same_bits

N = 50
# name: pack, sub-blocks, largest scale and min, largest code
WITH_MINS = {
    "Q2_K": (kquants.pack_q2_k, 16, 15, 3),
    "Q4_K": (kquants.pack_q4_k, 8, 63, 15),
    "Q5_K": (kquants.pack_q5_k, 8, 63, 31),
}
# name: pack, range of scales, range of codes
WITHOUT_MINS = {
    "Q3_K": (kquants.pack_q3_k, (-32, 31), (-4, 3)),
    "Q6_K": (kquants.pack_q6_k, (-128, 127), (-32, 31)),
}


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    """Return random integers from `low` to `high` as float32; both limits occur."""
    values = np.random.default_rng(seed).integers(low, high + 1, shape).astype(np.float32)
    values[0], values[1] = low, high
    return torch.from_numpy(values)


def scales(seed: int) -> Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(seed)).half().float()


@pytest.mark.parametrize("name", WITH_MINS)
def test_packed_blocks_with_mins_dequantize_to_their_fields(name: str, libggml: LibGGML) -> None:
    pack, n_sub, largest, largest_code = WITH_MINS[name]
    d, dmin = scales(1), scales(2)
    scale, minimum = integers(0, largest, N, n_sub, seed=3), integers(0, largest, N, n_sub, seed=4)
    codes = integers(0, largest_code, N, 256, seed=5)
    packed = pack(d, dmin, scale, minimum, codes)
    product = codes.view(N, n_sub, -1) * (d[:, None] * scale)[:, :, None]
    expected = (product - (dmin[:, None] * minimum)[:, :, None]).view(N, 256).numpy()
    assert_same_bits(libggml.dequantize(name, packed.numpy()), expected)
    assert_same_bits(QTYPES[name].dequantize_blocks(packed).numpy(), expected)


@pytest.mark.parametrize("name", WITHOUT_MINS)
def test_packed_blocks_without_mins_dequantize_to_their_fields(name: str, libggml: LibGGML) -> None:
    pack, scale_range, code_range = WITHOUT_MINS[name]
    d, scale, codes = scales(1), integers(*scale_range, N, 16, seed=3), integers(*code_range, N, 256, seed=5)
    packed = pack(d, scale, codes)
    expected = (codes.view(N, 16, 16) * (d[:, None] * scale)[:, :, None]).view(N, 256).numpy()
    assert_same_bits(libggml.dequantize(name, packed.numpy()), expected)
    assert_same_bits(QTYPES[name].dequantize_blocks(packed).numpy(), expected)
