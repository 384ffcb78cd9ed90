"""The float and legacy types: encoders are bit-equal to ggml's, and blocks written by hand dequantize correctly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wanquant.quant import QTYPES
from wanquant.quant.formats.legacy import round_half_away
from wanquant.testing.libggml import LibGGML
from wanquant.tests.quant.samples import WEIGHTS, weights

BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
FLOATS = ("F32", "F16", "BF16")


@pytest.mark.usefixtures("torch_only")
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("name", BLOCKS + FLOATS)
def test_fast_encoding_is_bit_equal_to_ggml(name: str, kind: str, libggml: LibGGML) -> None:
    weight = weights(kind, 32)
    packed = QTYPES[name].quantize(torch.from_numpy(weight), effort="fast").numpy()
    np.testing.assert_array_equal(packed, libggml.quantize(name, weight))


@pytest.mark.usefixtures("torch_only")
@pytest.mark.parametrize("name", BLOCKS)
def test_fast_encoding_is_bit_equal_to_ggml_on_a_million_elements(name: str, libggml: LibGGML) -> None:
    weight = np.random.default_rng(2).standard_normal((1024, 1024), np.float32)
    packed = QTYPES[name].quantize(torch.from_numpy(weight), effort="fast").numpy()
    np.testing.assert_array_equal(packed, libggml.quantize(name, weight))


@pytest.mark.parametrize("name", FLOATS)
def test_float_types_round_as_a_cast_does(name: str) -> None:
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name]
    weight = torch.randn(8, 100)
    for effort in ("fast", "best"):
        packed = QTYPES[name].quantize(weight, effort=effort)
        assert torch.equal(packed.view(dtype), weight.to(dtype))
        assert torch.equal(QTYPES[name].dequantize(packed), weight.to(dtype).float())


# d = 0.5 and m = 1 as float16, little-endian; the second weight's code is 2, all others are 0.
HALF, ONE = [0x00, 0x38], [0x00, 0x3C]
BY_HAND = {
    "Q4_0": ([*HALF, 0, 2, *[0] * 14], -4.0, -3.0),
    "Q4_1": ([*HALF, *ONE, 0, 2, *[0] * 14], 1.0, 2.0),
    "Q5_0": ([*HALF, 2, 0, 0, 0, *[0] * 16], -8.0, 0.0),
    "Q5_1": ([*HALF, *ONE, 2, 0, 0, 0, *[0] * 16], 1.0, 9.0),
    "Q8_0": ([*HALF, 0, 0xFE, *[0] * 30], 0.0, -1.0),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_written_by_hand_dequantize_correctly(name: str) -> None:
    block, others, second = BY_HAND[name]
    weight = QTYPES[name].dequantize(torch.tensor(block, dtype=torch.uint8))
    assert weight[1] == second
    assert (weight == others).sum() == 31


def test_round_half_away_rounds_halves_away_from_0() -> None:
    x = torch.tensor([0.5, -0.5, 1.5, 2.5, -2.5, 0.49999997, -0.49999997, 8388607.5, 3.0])
    assert round_half_away(x).tolist() == [1, -1, 2, 3, -3, 0, 0, 8388608, 3]
