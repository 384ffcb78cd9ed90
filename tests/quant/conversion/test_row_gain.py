"""Quantized rows keep the gain of the original rows."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from wanquant.quant import QTYPES, convert, open_gguf
from wanquant.quant.conversion.layer_encoder import LayerEncoder
from wanquant.quant.conversion.row_gain import restore_gain, restore_gain_of_layer
from wanquant.quant.native.layer_type import LayerType
from wanquant.quant.native.registry import NATIVE
from wanquant.testing.tiny_wan import write_tiny_wan

TYPES = [name for name, qtype in QTYPES.items() if qtype.block.factors]


def gains(weight, dequantized, importance=1.0):
    return (importance * weight * dequantized).sum(1) / (importance * weight * weight).sum(1)


@pytest.fixture
def weight():
    return torch.randn(8, 4096, generator=torch.Generator().manual_seed(0)) * 0.02


def test_every_type_with_a_search_has_factors():
    searched = {name for name, qtype in QTYPES.items() if qtype.block_size > 1 and qtype.best}
    assert searched - {"TQ1_0", "TQ2_0", "MXFP4"} <= set(TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_weights_are_linear_in_the_factors(name, weight):
    qtype = QTYPES[name]
    packed = qtype.quantize(weight, effort="fast" if qtype.fast else "best")
    dequantized = qtype.dequantize(packed)
    # The packed values are half of these weights, so the gain doubles.
    doubled = qtype.dequantize(restore_gain(qtype, packed, 2 * dequantized))
    torch.testing.assert_close(doubled, 2 * dequantized, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("name", TYPES)
def test_gain_of_rows_is_restored(name, weighted, weight):
    qtype = QTYPES[name]
    importance = torch.rand(4096, generator=torch.Generator().manual_seed(1)) if weighted else None
    weights = 1.0 if importance is None else importance
    packed = qtype.quantize(weight, importance)
    before = qtype.dequantize(packed)
    after = qtype.dequantize(restore_gain(qtype, packed, weight, importance))
    deviation = (gains(weight, before, weights) - 1).abs().mean()
    assert (gains(weight, after, weights) - 1).abs().mean() < max(0.2 * deviation, 2**-11), "float16 rounds"
    squares = [(weights * (dequantized - weight).square()).sum() for dequantized in (before, after)]
    # Restoring the gain of a row divides by what the error has left of it.
    share = squares[0] / (weights * weight.square()).sum()
    assert squares[1] < max(1.08, 1.02 / (1 - share)) * squares[0], "the squared error grows only a little"


@pytest.mark.parametrize("name", [name for name in TYPES if len(QTYPES[name].block.factors) == 2])
def test_sums_of_rows_are_restored_for_types_with_minima(name, weight):
    qtype = QTYPES[name]
    weight += 0.01
    after = qtype.dequantize(restore_gain(qtype, qtype.quantize(weight), weight))
    assert ((after.sum(1) / weight.sum(1)) - 1).abs().max() < 1e-2, "float16 rounds"
    assert (gains(weight, after) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("name", TYPES)
def test_rows_without_weights_or_importance_do_not_change(name, weight):
    qtype = QTYPES[name]
    weight[3] = 0
    importance = torch.zeros(4096)
    packed = qtype.quantize(weight, importance)
    assert torch.equal(restore_gain(qtype, packed.clone(), weight, importance), packed)
    dequantized = qtype.dequantize(restore_gain(qtype, qtype.quantize(weight), weight))
    assert dequantized.isfinite().all()
    assert not dequantized[3].any()


@pytest.mark.parametrize(("effort", "expected"), [("best", True), ("fast", False)])
def test_only_conversions_at_effort_best_restore_the_gain(tmp_path, effort, expected):
    source = write_tiny_wan(tmp_path / "wan.safetensors", layers=1, ffn_dim=512)
    name = "blocks.0.ffn.0.weight"
    file = open_gguf(convert(source, tmp_path / "a.gguf", "Q2_K", effort=effort).path)
    gain = gains(load_file(source)[name].float(), file.tensors[name].dequantize())
    assert ((gain - 1).abs().mean() < 0.005) == expected


@pytest.mark.parametrize("name", TYPES)
def test_large_weights_keep_the_gain_of_the_row(name, weight):
    """Scales of least squared error would cut off large weights."""
    qtype, large = QTYPES[name], weight.abs() > 2 * weight.std()

    def gain_of_large(dequantized):
        return ((weight * dequantized)[large].sum() / weight[large].square().sum()).item()

    least = qtype.dequantize(restore_gain(qtype, qtype.quantize(weight), weight))
    kept = qtype.dequantize(LayerEncoder().quantize(qtype, weight))
    assert abs(gain_of_large(kept) - 1) < max(0.9 * abs(gain_of_large(least) - 1), 2**-10)
    squares = [(dequantized - weight).square().sum() for dequantized in (least, kept)]
    assert squares[1] < 1.06 * squares[0], "the squared error grows only a little"


WITH_SCALE = [name for name, native in NATIVE.items() if native.free_scale]


def total_gain(weight, dequantized):
    return float((weight.double() * dequantized.double()).sum() / weight.double().square().sum())


def test_scales_of_comfyui_formats_are_free_where_they_need_no_power_of_two_and_their_grid_is_not_of_floats():
    assert set(WITH_SCALE) == NATIVE.keys() - {"FP8", "MXFP8"}


@pytest.mark.parametrize("magnitude", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("name", WITH_SCALE)
def test_gain_of_comfyui_formats_is_restored(name, magnitude, weight):
    weight, qtype = magnitude * weight, LayerType(NATIVE[name], (8, 4096))
    before = qtype.dequantize(qtype.quantize(weight))
    packed = LayerEncoder().quantize(qtype, weight)
    after = qtype.dequantize(packed)
    shrinkage = abs(total_gain(weight, before) - 1)
    assert abs(total_gain(weight, after) - 1) < max(0.01 * shrinkage, 1e-6)
    if name != "NVFP4":  # it has one scale for all rows
        assert (gains(weight / magnitude, after / magnitude) - 1).abs().max() < 1e-5
    errors = [float((dequantized - weight).double().norm()) for dequantized in (before, after)]
    assert errors[1] < 1.01 * errors[0]
    assert torch.equal(LayerEncoder().quantize(qtype, weight, "fast"), qtype.quantize(weight, effort="fast"))


@pytest.mark.parametrize("name", WITH_SCALE)
def test_rows_of_zeros_in_comfyui_formats_keep_their_scale(name, weight):
    weight[3], qtype = 0, LayerType(NATIVE[name], (8, 4096))
    for tensor in (weight, torch.zeros_like(weight)):
        dequantized = qtype.dequantize(LayerEncoder().quantize(qtype, tensor))
        assert dequantized.isfinite().all() and not dequantized[3].any()
    packed, scale = qtype.quantize(weight), NATIVE[name].free_scale
    kept = qtype.split(restore_gain_of_layer(qtype, packed, weight, torch.zeros(4096)))[scale]
    assert torch.equal(kept, qtype.split(packed)[scale])
