"""QuantType encodes weights of any dtype, strides and number of rows, with importance, and by ggml's C code."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from wanquant.quant import QTYPES, QuantError, QuantType, device
from wanquant.quant.encoders import ggml as reference
from wanquant.quant.kernels.optional import GGML
from wanquant.quant.qtype import Effort
from wanquant.testing.libggml import LibGGML
from wanquant.tests.quant.portable import PortableOps

Q8_0 = QTYPES["Q8_0"]


@pytest.mark.parametrize(
    ("quant", "effort"),
    [pytest.param(q, e, id=f"{q.name}-{e}") for q in QTYPES.values() for e in q.efforts if e == "best" or q.fast],
)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.usefixtures("torch_only")
def test_encoding_is_portable(quant: QuantType, effort: Effort, weighted: bool, monkeypatch) -> None:
    monkeypatch.setattr(reference, "_SQUARE_ROOT_DTYPES", {})
    weight = torch.randn(4, 2 * quant.block_size)
    importance = torch.rand(2 * quant.block_size) if weighted else None
    with PortableOps() as ops:
        quant.quantize(weight, importance, effort)
    assert {"copy", "view"} <= ops.seen


def test_encoding_takes_any_float_dtype_strides_and_axes() -> None:
    weight = torch.randn(64, 6).half().t()
    expected = Q8_0.quantize(weight.float().contiguous(), effort="fast")
    assert torch.equal(Q8_0.quantize(weight, effort="fast"), expected)
    assert torch.equal(Q8_0.quantize(weight.double(), effort="fast"), expected)
    assert torch.equal(Q8_0.quantize(weight.reshape(2, 3, 64), effort="fast"), expected.view(2, 3, 68))


@pytest.mark.parametrize("chunk", [1, 32, 64, 96, 1 << 18])
def test_importance_follows_its_input_channels_in_every_chunk(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def spy(blocks: Tensor, importance: Tensor | None) -> Tensor:
        assert importance is not None
        seen.append((blocks.clone(), importance.clone()))
        return torch.zeros(len(blocks), 34, dtype=torch.uint8)

    monkeypatch.setattr(device, "_CPU_ELEMENTS", chunk)
    importance = torch.arange(96.0)
    replace(Q8_0, best=spy).quantize(importance.repeat(5, 1), importance)
    assert sum(len(blocks) for blocks, _ in seen) == 15
    for blocks, channels in seen:
        assert torch.equal(blocks, channels)
        assert channels.dtype == torch.float32
        assert channels.is_contiguous()


@pytest.mark.parametrize("quant", [q for q in QTYPES.values() if q.best], ids=lambda quant: quant.name)
def test_encoding_in_chunks_equals_encoding_at_once(quant: QuantType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The errors are equal up to the last bits of sums, whose order may depend on the length of a chunk."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 2 * quant.block_size, generator=generator)
    importance = torch.rand(2 * quant.block_size, generator=generator)

    def error() -> Tensor:
        restored = quant.dequantize(quant.quantize(weight, importance))
        return ((restored - weight).square() * importance).sum(1)

    whole = error()
    monkeypatch.setattr(device, "_CPU_ELEMENTS", quant.block_size)
    torch.testing.assert_close(error(), whole, rtol=1e-2, atol=0)


@pytest.mark.parametrize("quant", [q for q in QTYPES.values() if q.fast], ids=lambda quant: quant.name)
def test_fast_with_importance_equals_best(quant: QuantType) -> None:
    weight = torch.randn(2, 256, generator=torch.Generator().manual_seed(0))
    importance = torch.rand(256, generator=torch.Generator().manual_seed(1))
    effort: Effort = "best" if quant.best else "fast"
    assert torch.equal(quant.quantize(weight, importance, "fast"), quant.quantize(weight, importance, effort))


IN_C = [q for q in QTYPES.values() if q.fast_in_c]


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("quant", IN_C, ids=lambda quant: quant.name)
def test_fast_of_iq_types_is_ggml_with_the_importance(quant: QuantType, weighted: bool, libggml: LibGGML) -> None:
    weight = torch.randn(5, 2, 512, generator=torch.Generator().manual_seed(0))
    importance = torch.rand(512, generator=torch.Generator().manual_seed(1)) + 0.1 if weighted else None
    if importance is None and quant.fast_in_c == "requires importance":
        with pytest.raises(QuantError, match=f"{quant.name}: effort fast got no importance.*give an importance matrix"):
            quant.quantize(weight, effort="fast")
        return
    # A sum of importance has no rounding that a factor of 2 could change, but ggml compares it with constants.
    relative = None if importance is None else (importance / importance.mean()).numpy()
    expected = libggml.quantize(quant.name, weight.numpy(), relative)
    assert np.array_equal(quant.quantize(weight, importance, "fast").numpy(), expected)
    assert torch.equal(quant.quantize(weight.half(), importance, "fast")[:0], torch.empty(0, 2, expected.shape[-1]))


@pytest.mark.parametrize("quant", IN_C, ids=lambda quant: quant.name)
def test_fast_of_iq_types_survives_what_ggml_does_not(quant: QuantType) -> None:
    weight = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    weight[0, 3], weight[1, :7], weight[2] = torch.nan, torch.inf, 3e38
    for importance in (torch.zeros(512), torch.ones(512).index_fill(0, torch.arange(300), 0)):
        assert quant.dequantize(quant.quantize(weight, importance, "fast")).isfinite().all()


@pytest.mark.parametrize("quant", IN_C, ids=lambda quant: quant.name)
def test_fast_of_iq_types_is_refused_without_libggml(quant: QuantType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GGML, "quantize_rows", lambda *_: False)
    with pytest.raises(QuantError, match=f"{quant.name}: effort fast is ggml's C code.*install libggml-python 0.20"):
        quant.quantize(torch.ones(256), torch.ones(256), "fast")


def test_integers_within_the_range_of_a_type_are_lossless() -> None:
    for name in ("F32", "F16", "BF16", "Q4_0", "Q5_0", "Q8_0"):
        quant = QTYPES[name]
        largest = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 127}.get(name, 64)
        weight = torch.randint(-largest, largest, (4, 4 * quant.block_size)).float()
        weight[:, :: quant.block_size] = -largest
        assert torch.equal(quant.dequantize(quant.quantize(weight, effort="fast")), weight), name


def test_non_finite_weights_do_not_spoil_other_blocks() -> None:
    weight = torch.randn(4, 32)
    expected = Q8_0.quantize(weight, effort="fast")
    for value in (np.nan, np.inf, -np.inf):
        weight[1, 5] = value
        packed = Q8_0.quantize(weight, effort="fast")
        assert torch.equal(packed[[0, 2, 3]], expected[[0, 2, 3]])
