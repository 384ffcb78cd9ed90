"""ggml's C code behind the operator and the fast encoders, on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wanquant.quant import QTYPES
from wanquant.quant.kernels import libggml, op
from wanquant.quant.kernels.optional import OptionalPath
from wanquant.tests.quant.samples import WEIGHTS, assert_same_bits, random_blocks, special_blocks, weights


def test_is_what_decodes_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(libggml, "dequantize", lambda *arguments: seen.append(arguments))
    monkeypatch.setitem(op._PATHS, "cpu", OptionalPath("libggml", ""))
    QTYPES["Q4_K"].dequantize(random_blocks(QTYPES["Q4_K"], 2))
    assert len(seen) == 1


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", libggml.FORMATS)
def test_same_bits_as_the_torch_operations(name, dtype, threads, monkeypatch: pytest.MonkeyPatch) -> None:
    quant = QTYPES[name]
    monkeypatch.setattr(libggml, "_WEIGHTS", 5 * quant.block_size)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for blocks in (random_blocks(quant, 1), random_blocks(quant, 33), special_blocks(quant)):
        weights = torch.full((len(blocks), quant.block_size), 7, dtype=dtype)
        libggml.dequantize(quant, blocks, weights)
        assert_same_bits(weights.float().numpy(), quant.decode(blocks).to(dtype).float().numpy())


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("name", libggml.ENCODERS)
def test_same_bytes_as_the_torch_encoders(name, kind, threads, monkeypatch: pytest.MonkeyPatch) -> None:
    quant = QTYPES[name]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    weight = torch.from_numpy(weights(kind, 32))
    for part in (weight[:1, :32], weight[:3, 32:], weight[:, 32:96].half(), weight[1:6].t().contiguous().t()):
        expected = quant.fast(part.float().reshape(-1, 32), None)
        assert torch.equal(quant.quantize(part, effort="fast").flatten(), expected.flatten())


def test_is_what_encodes_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(blocks: Tensor, importance: Tensor | None) -> Tensor:
        return torch.full((len(blocks), 34), 7, dtype=torch.uint8)

    monkeypatch.setitem(libggml.ENCODERS, "Q8_0", encode)
    weight = torch.ones(2, 32)
    assert (QTYPES["Q8_0"].quantize(weight, torch.ones(32), effort="fast") == 7).all()
    assert not (QTYPES["Q8_0"].quantize(weight) == 7).all()


def test_every_format_passes_its_check() -> None:
    assert tuple(libggml.FORMATS) == libggml._NAMES
    assert tuple(libggml.ENCODERS) == libggml._ENCODED


def test_a_build_that_encodes_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libggml, "_encode", lambda quant, blocks: QTYPES["Q4_0"].fast(1.0001 * blocks, None))
    assert not libggml._same_codes(QTYPES["Q4_0"])
    monkeypatch.setattr(libggml, "_same_sizes", lambda quant: False)
    assert not libggml._same_codes(QTYPES["Q8_0"])


def test_a_build_that_decodes_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"Q4_0": "IQ4_NL", "Q4_K": "Q5_K"}
    traits = libggml.type_traits
    monkeypatch.setattr(libggml, "type_traits", lambda quant: traits(QTYPES[other.get(quant.name, quant.name)]))
    assert not libggml._same_bits(QTYPES["Q4_0"])
    assert not libggml._same_bits(QTYPES["Q4_K"])
    assert libggml._same_bits(QTYPES["Q8_0"])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libggml, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match="libggml-python is not installed"):
        libggml._load()
