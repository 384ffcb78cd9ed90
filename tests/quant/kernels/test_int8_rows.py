"""Rotated 8-bit rows of packed weights: their definition, their error, and what is refused."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import Tensor

from wanquant.quant import QTYPES, QuantError
from wanquant.quant import torch_op as op
from wanquant.quant.kernels import eager
from wanquant.quant.kernels.optional import OptionalPath
from wanquant.quant.native.rotation import hadamard, rotate

SHAPE = (5, 512)


def weights() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 0.02


def int8_rows(packed: Tensor, name: str) -> tuple[Tensor, Tensor]:
    rows, columns = QTYPES[name].unpacked_shape(tuple(packed.shape))
    codes, scales = torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows, 1)
    op.int8_rows_into(packed, name, codes, scales)
    return codes, scales


@pytest.mark.parametrize("name", ["F32", "BF16", "Q4_K", "Q8_0"])
def test_codes_are_the_rotated_weight_in_steps_of_the_scale(name: str) -> None:
    packed = QTYPES[name].quantize(weights(), effort="fast")
    codes, scales = int8_rows(packed, name)
    exact = QTYPES[name].dequantize(packed).double().view(-1, 256) @ hadamard(256).double()
    steps = exact.view(SHAPE) / scales
    assert torch.allclose(steps.abs().amax(1), torch.tensor(127.0).double(), rtol=1e-5)
    assert ((codes - steps).abs() <= 0.5001).all()
    assert (codes.abs().amax(1) == 127).all()


def test_what_is_added_to_the_rotated_rows() -> None:
    """Rotating is linear: rows plus the rotated change are the rotated sum."""
    change = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) * 0.02
    codes, scales = torch.empty(SHAPE, dtype=torch.int8), torch.empty(SHAPE[0], 1)
    op.int8_rows_into(weights().view(torch.uint8), "F32", codes, scales, rotate(change))
    expected, their_scales = int8_rows((weights() + change).view(torch.uint8), "F32")
    assert torch.allclose(scales, their_scales)
    assert (codes != expected).float().mean() < 0.001
    unchanged = int8_rows(weights().view(torch.uint8), "F32")[0]
    assert (codes != unchanged).float().mean() > 0.5
    for wrong in (rotate(change)[1:], rotate(change).t().contiguous().t(), codes):
        with pytest.raises(QuantError, match="to add, expected floating point of shape"):
            op.int8_rows_into(weights().view(torch.uint8), "F32", codes, scales, wrong)


def test_rows_of_zeros_and_of_nan() -> None:
    rows = torch.zeros(3, 256)
    rows[1, 7] = torch.nan
    codes, scales = int8_rows(rows.view(torch.uint8), "F32")
    assert codes[0].count_nonzero() == codes[2].count_nonzero() == 0
    assert scales.flatten().isnan().tolist() == [False, True, False]


def test_a_part_of_the_rows_has_the_bits_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = QTYPES["Q4_K"].quantize(weights(), effort="fast")
    whole = int8_rows(packed, "Q4_K")
    monkeypatch.setattr(eager, "CPU_PRODUCTS", 2 * SHAPE[1])
    assert all(torch.equal(a, b) for a, b in zip(whole, int8_rows(packed, "Q4_K"), strict=True))
    assert all(torch.equal(a[1:4], b) for a, b in zip(whole, int8_rows(packed[1:4], "Q4_K"), strict=True))


def test_both_orders_of_the_rotation_undo_it() -> None:
    rows = weights()
    for distances in ((64, 16, 4, 1), eager.INT8_DISTANCES):
        turned = rotate(rows, distances)
        assert torch.allclose(rotate(turned, distances), rows, atol=1e-7)
        assert torch.allclose(turned, (rows.view(-1, 256) @ hadamard(256)).view(SHAPE), atol=1e-7)


def test_the_error_is_at_most_kitchens() -> None:
    layouts = pytest.importorskip("comfy_kitchen.tensor.int8", reason="this ComfyUI has no INT8 arithmetic")
    dense = torch.randn(64, 2048, generator=torch.Generator().manual_seed(1)).bfloat16()
    codes, scales = int8_rows(dense.view(torch.uint8), "BF16")
    theirs, params = layouts.TensorWiseINT8Layout.quantize(dense, per_channel=True, convrot=True)

    def error(codes: Tensor, scales: Tensor) -> float:
        return float((rotate(codes.float() * scales.view(-1, 1)) - dense).norm() / dense.norm())

    assert error(codes, scales) < error(theirs, params.scale)


def test_meta_tensors_allocate_nothing_else() -> None:
    packed = torch.empty(2, 288, dtype=torch.uint8, device="meta")
    outputs = torch.empty(2, 512, dtype=torch.int8, device="meta"), torch.empty(2, 1, device="meta")
    op.int8_rows_into(packed, "Q4_K", *outputs)


def test_a_faster_path_is_used_where_it_knows_the_type(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(quant: object, packed: Tensor, codes: Tensor, scales: Tensor, delta: Tensor | None) -> bool:
        if packed.data_ptr() % 16 or quant is not QTYPES["Q4_K"]:
            return False
        codes.fill_(3)
        return True

    monkeypatch.setitem(sys.modules, "wanquant.quant.kernels.fake", types.SimpleNamespace(int8_rows=fill))
    monkeypatch.setitem(op._INT8_PATHS, "cpu", OptionalPath("fake", "fakes"))
    packed = torch.zeros(1 + 2 * 288, dtype=torch.uint8)[1:].view(2, 288)
    assert (int8_rows(packed, "Q4_K")[0] == 3).all()
    assert (int8_rows(torch.zeros(2, 420, dtype=torch.uint8), "Q6_K")[0] == 0).all()


@pytest.mark.parametrize(
    ("codes", "scales"),
    [
        (torch.empty(2, 256, dtype=torch.int8), torch.empty(2, 1)),
        (torch.empty(2, 512, dtype=torch.uint8), torch.empty(2, 1)),
        (torch.empty(512, 2, dtype=torch.int8).t(), torch.empty(2, 1)),
        (torch.empty(2, 512, dtype=torch.int8), torch.empty(2)),
        (torch.empty(2, 512, dtype=torch.int8), torch.empty(2, 1, device="meta")),
    ],
    ids=["too small", "unsigned", "strides", "scales", "devices"],
)
def test_outputs_that_would_be_written_out_of_bounds_are_refused(codes: Tensor, scales: Tensor) -> None:
    with pytest.raises(QuantError, match="Q4_K"):
        op.int8_rows_into(torch.zeros(2, 288, dtype=torch.uint8), "Q4_K", codes, scales)


def test_columns_that_cannot_be_rotated_are_refused() -> None:
    with pytest.raises(QuantError, match="multiple of 256"):
        int8_rows(torch.zeros(2, 34 * 4, dtype=torch.uint8), "Q8_0")
