"""ggml's C code dequantizes on the CPU and encodes with effort `fast`, where it gives the right bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wanquant.quant import QTYPES
from wanquant.quant import torch_op as op
from wanquant.quant.kernels import libggml
from wanquant.quant.kernels.optional import OptionalPath
from wanquant.testing.libggml import LibGGML, load
from wanquant.tests.quant.samples import WEIGHTS, assert_same_bits, random_blocks, special_blocks, weights

LEGACY_AND_K = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
DEQUANTIZED = (*LEGACY_AND_K, "IQ4_NL", "IQ4_XS", "IQ1_S", "IQ1_M", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4")
QUANTIZED = (*LEGACY_AND_K, "TQ1_0", "TQ2_0", "MXFP4")


@pytest.fixture(scope="module")
def oracle() -> LibGGML:
    return load()


def test_the_operator_uses_it_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(libggml, "dequantize", lambda *arguments: seen.append(arguments) or True)
    monkeypatch.setitem(op._PATHS, "cpu", OptionalPath("libggml", ""))
    QTYPES["Q4_K"].dequantize(random_blocks(QTYPES["Q4_K"], 2))
    assert len(seen) == 1


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", DEQUANTIZED)
def test_dequantizes_to_the_bits_of_the_torch_operations(name, dtype, threads, monkeypatch: pytest.MonkeyPatch) -> None:
    quant = QTYPES[name]
    monkeypatch.setattr(libggml, "_ELEMENTS", 5 * quant.block_size)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for blocks in (random_blocks(quant, 1), random_blocks(quant, 33), special_blocks(quant)):
        weights = torch.full((len(blocks), quant.block_size), 7, dtype=dtype)
        assert libggml.dequantize(quant, blocks, weights)
        assert_same_bits(weights.float().numpy(), quant.dequantize_blocks(blocks).to(dtype).float().numpy())


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("name", QUANTIZED)
def test_encodes_any_part_of_a_tensor(name, kind, threads, oracle: LibGGML, monkeypatch: pytest.MonkeyPatch) -> None:
    quant = QTYPES[name]
    size = quant.block_size
    monkeypatch.setattr(libggml, "_ELEMENTS", 5 * size)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    weight = torch.from_numpy(weights(kind, size))
    for part in (weight[:1, :size], weight[:3, size:], weight[:, size : 3 * size].half(), weight[:6].t().clone().t()):
        packed = torch.empty(quant.packed_shape(tuple(part.shape)), dtype=torch.uint8)
        assert libggml.quantize(quant, part.reshape(-1, size), packed.view(-1, quant.type_size))
        assert np.array_equal(packed.numpy(), oracle.quantize(name, part.float().numpy()))


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K"])
def test_only_fast_encoding_without_importance_uses_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    quant, seen = QTYPES[name], []
    monkeypatch.setattr(libggml, "quantize", lambda *arguments: seen.append(arguments) or True)
    weight = torch.ones(2, 256)
    quant.quantize(weight, effort="fast")
    assert len(seen) == 1
    quant.quantize(weight)
    quant.quantize(weight, torch.ones(256), effort="fast")
    assert len(seen) == 1


def test_is_used_where_it_gives_the_same_bits_and_is_faster() -> None:
    assert [name for name, quant in QTYPES.items() if libggml._dequantizer(quant)] == list(DEQUANTIZED)
    assert [name for name, quant in QTYPES.items() if libggml._quantizer(quant)] == list(QUANTIZED)


def test_a_build_that_encodes_to_other_bytes_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"Q4_0": "IQ4_NL", "Q4_K": "Q3_K"}
    traits = libggml.type_traits
    monkeypatch.setattr(libggml, "_same_sizes", lambda quant: True)
    monkeypatch.setattr(libggml, "type_traits", lambda quant: traits(QTYPES[other.get(quant.name, quant.name)]))
    assert not libggml._same_codes(QTYPES["Q4_0"])
    assert not libggml._same_codes(QTYPES["Q4_K"])
    assert libggml._same_codes(QTYPES["Q8_0"])
    monkeypatch.setattr(libggml, "_same_sizes", lambda quant: False)
    assert not libggml._same_codes(QTYPES["Q8_0"])


def test_a_build_that_dequantizes_to_other_bits_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"Q4_0": "IQ4_NL", "Q4_K": "Q5_K"}
    traits = libggml.type_traits
    monkeypatch.setattr(libggml, "type_traits", lambda quant: traits(QTYPES[other.get(quant.name, quant.name)]))
    assert not libggml._same_bits(QTYPES["Q4_0"])
    assert not libggml._same_bits(QTYPES["Q4_K"])
    assert libggml._same_bits(QTYPES["Q8_0"])


def test_a_missing_package_is_reported_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libggml, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match="libggml-python is not installed"):
        libggml._load()


def test_another_release_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libggml, "version", lambda _: "0.21.0")
    with pytest.raises(ImportError, match=r"libggml-python 0\.21\.0 is installed, expected 0\.20\.\*"):
        libggml._load()
