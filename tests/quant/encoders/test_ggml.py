"""The `fast` encoders of K-quants and IQ4 write the bytes of ggml's C library with torch operations alone."""

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
HARD = (*test_search.SPECIAL, *test_search.HARD)

pytestmark = pytest.mark.usefixtures("torch_only")


def assert_bytes_equal_ggml(name: str, weight: NDArray[np.float32], libggml: LibGGML) -> None:
    packed = QTYPES[name].quantize(torch.from_numpy(weight), effort="fast").numpy()
    np.testing.assert_array_equal(packed, libggml.quantize(name, weight))


@pytest.mark.parametrize("kind", samples.WEIGHTS)
@pytest.mark.parametrize("name", TYPES)
def test_fast_encoding_is_bit_equal_to_ggml(name: str, kind: str, libggml: LibGGML) -> None:
    assert_bytes_equal_ggml(name, samples.weights(kind, 256), libggml)


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("name", TYPES)
def test_fast_encoding_of_hard_weights_is_bit_equal_to_ggml(name: str, kind: str, libggml: LibGGML) -> None:
    assert_bytes_equal_ggml(name, test_search.weights(kind), libggml)


@pytest.mark.parametrize("name", TYPES)
def test_fast_encoding_of_a_million_elements_is_bit_equal_to_ggml(name: str, libggml: LibGGML) -> None:
    assert_bytes_equal_ggml(name, np.random.default_rng(2).standard_normal((1024, 1024), np.float32), libggml)


def nearly_one_value() -> NDArray[np.float32]:
    """Return weights whose differences are near float32's precision: ggml then fits a line to rounding errors."""
    return (1e-7 * np.random.default_rng(4).standard_normal((64, 1024)) - 1).astype(np.float32)


def few_values() -> NDArray[np.float32]:
    return np.random.default_rng(4).choice(np.array([0, 0.1, -0.3], np.float32), (64, 1024))


def every_magnitude() -> NDArray[np.float32]:
    rng = np.random.default_rng(4)
    return np.ldexp(rng.standard_normal((64, 1024), np.float32), rng.integers(-60, 30, (64, 1024)))


@pytest.mark.parametrize("weights", [nearly_one_value, few_values, every_magnitude])
@pytest.mark.parametrize("name", TYPES)
def test_fast_encoding_that_depends_on_rounding_errors_is_bit_equal_to_ggml(
    name: str, weights, libggml: LibGGML
) -> None:
    assert_bytes_equal_ggml(name, weights(), libggml)


@pytest.mark.parametrize("name", TYPES)
def test_nan_and_infinity_change_only_their_own_block(name: str) -> None:
    weight = torch.randn(1, 512)
    weight[0, 3], weight[0, 9] = torch.nan, torch.inf
    packed = QTYPES[name].quantize(weight, effort="fast")
    half = packed.shape[1] // 2
    assert torch.equal(packed[:, half:], QTYPES[name].quantize(weight[:, 256:], effort="fast"))


@pytest.mark.parametrize("name", TYPES)
def test_encoding_creates_tensors_on_the_device_of_the_weight(name: str) -> None:
    shape = QTYPES[name].packed_shape((3, 512))
    assert QTYPES[name].quantize(torch.empty(3, 512, device="meta"), effort="fast").shape == shape


def test_square_roots_are_correctly_rounded() -> None:
    values = torch.rand(4096, generator=torch.Generator().manual_seed(0)) * 100
    assert np.array_equal(reference._square_root(values).numpy(), np.sqrt(values.numpy()))
