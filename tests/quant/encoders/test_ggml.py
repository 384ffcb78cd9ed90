"""ggml's own encoders of K-quants and IQ4 in torch operations: the same bytes as the library's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from wanquant.quant import QTYPES
from wanquant.quant.encoders import ggml as reference
from wanquant.testing.libggml import LibGGML
from wanquant.tests.quant import samples
from wanquant.tests.quant.encoders import test_search

TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
HARD = ("zeros", "sparse", "subnormal scales", "subnormal weights", *test_search.HARD)

pytestmark = pytest.mark.usefixtures("torch_only")


def assert_ggmls_bytes(name: str, weight: NDArray[np.float32], libggml: LibGGML) -> None:
    packed = QTYPES[name].quantize(torch.from_numpy(weight), effort="fast").numpy()
    np.testing.assert_array_equal(packed, libggml.quantize(name, weight))


@pytest.mark.parametrize("kind", samples.WEIGHTS)
@pytest.mark.parametrize("name", TYPES)
def test_fast_encoding_is_bit_equal_to_ggml(name: str, kind: str, libggml: LibGGML) -> None:
    assert_ggmls_bytes(name, samples.weights(kind, 256), libggml)


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("name", TYPES)
def test_hard_weights_too(name: str, kind: str, libggml: LibGGML) -> None:
    assert_ggmls_bytes(name, test_search.weights(kind), libggml)


@pytest.mark.parametrize("name", TYPES)
def test_a_million_weights_too(name: str, libggml: LibGGML) -> None:
    assert_ggmls_bytes(name, np.random.default_rng(2).standard_normal((1024, 1024), np.float32), libggml)


def nearly_one_value() -> NDArray[np.float32]:
    """Which floats hardly tell apart: ggml then solves for a line through rounding errors."""
    return (1e-7 * np.random.default_rng(4).standard_normal((64, 1024)) - 1).astype(np.float32)


def few_values() -> NDArray[np.float32]:
    return np.random.default_rng(4).choice(np.array([0, 0.1, -0.3], np.float32), (64, 1024))


def every_magnitude() -> NDArray[np.float32]:
    rng = np.random.default_rng(4)
    return np.ldexp(rng.standard_normal((64, 1024), np.float32), rng.integers(-60, 30, (64, 1024)))


@pytest.mark.parametrize("weights", [nearly_one_value, few_values, every_magnitude])
@pytest.mark.parametrize("name", TYPES)
def test_sums_of_rounding_errors_too(name: str, weights, libggml: LibGGML) -> None:
    assert_ggmls_bytes(name, weights(), libggml)


@pytest.mark.parametrize("name", TYPES)
def test_weights_that_are_no_numbers_stay_in_their_block(name: str) -> None:
    weight = torch.randn(1, 512)
    weight[0, 3], weight[0, 9] = torch.nan, torch.inf
    packed = QTYPES[name].quantize(weight, effort="fast")
    half = packed.shape[1] // 2
    assert torch.equal(packed[:, half:], QTYPES[name].quantize(weight[:, 256:], effort="fast"))


@pytest.mark.parametrize("name", TYPES)
def test_nothing_is_left_on_the_cpu(name: str) -> None:
    shape = QTYPES[name].packed_shape((3, 512))
    assert QTYPES[name].quantize(torch.empty(3, 512, device="meta"), effort="fast").shape == shape


def test_square_roots_are_the_nearest_numbers() -> None:
    values = torch.rand(4096, generator=torch.Generator().manual_seed(0)) * 100
    assert np.array_equal(reference._root(values).numpy(), np.sqrt(values.numpy()))
