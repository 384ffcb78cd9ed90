"""GGUF blocks inside the host's QuantizedTensor."""

from __future__ import annotations

import pytest
import torch
from comfy.memory_management import interpret_gathered_like, vram_aligned_size
from comfy.quant_ops import QuantizedTensor

from wanquant.ops.packed.layout import LAYOUT_NAME, GGUFLayout, dense, is_packed, pack, with_dtype
from wanquant.quant import QTYPES

SHAPE = (8, 256)


@pytest.fixture
def packed():
    qdata = QTYPES["Q4_0"].quantize(torch.randn(SHAPE), effort="fast")
    return pack(qdata, "Q4_0", SHAPE, torch.bfloat16)


def test_looks_like_the_weight_and_costs_its_bytes(packed):
    assert packed.shape == SHAPE
    assert packed.dtype == torch.bfloat16
    assert packed.nbytes == 8 * 8 * 18
    assert vram_aligned_size(packed) == 2048


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_decodes_in_one_rounding(packed, dtype):
    exact = QTYPES["Q4_0"].dequantize(packed._qdata)
    for weight in (packed.to(dtype).dequantize(), dense(packed, dtype)):
        assert weight.dtype == dtype
        assert torch.equal(weight, exact.to(dtype))


def test_decoded_weight_is_private(packed):
    packed.dequantize().zero_()
    assert packed.dequantize().count_nonzero() > 0
    plain = torch.ones(2)
    assert dense(plain, torch.float16) is plain


def test_changing_dtype_keeps_the_bytes(packed):
    other = with_dtype(packed, torch.float32)
    assert other.dtype == torch.float32
    assert other._qdata.data_ptr() == packed._qdata.data_ptr()


def test_copy_into_another_leaves_the_source_and_its_siblings_alone(packed):
    sibling = packed.detach()
    target = torch.empty_like(packed, dtype=torch.float32)
    target.copy_(packed)
    assert (target.dtype, target.params.orig_dtype) == (torch.float32, torch.float32)
    assert (sibling.params.orig_dtype, packed.params.orig_dtype) == (torch.bfloat16, torch.bfloat16)
    assert torch.equal(target._qdata, packed._qdata)


def test_survives_the_hosts_transfer_buffer(packed):
    buffer = torch.zeros(vram_aligned_size(packed), dtype=torch.uint8)
    (view,) = interpret_gathered_like([packed], buffer)
    view.copy_(packed)
    assert is_packed(view)
    assert torch.equal(view.dequantize(), packed.dequantize())


def test_any_other_operation_decodes(packed):
    assert torch.equal(packed + 0, packed.dequantize())
    assert packed[:2].shape == (2, 256)


def test_quantize_is_the_degraded_path(packed):
    weight = packed.dequantize()
    again = QuantizedTensor.from_float(weight, LAYOUT_NAME, scale="recalculate", stochastic_rounding=3)
    assert again.params.qtype == "Q8_0"
    assert GGUFLayout.requantize_kwargs(packed) == {"qtype": "Q4_0"}
    torch.testing.assert_close(again.dequantize(), weight, atol=0.02, rtol=0.02)
