"""Calibrated rounding: less error in the outputs for correlated inputs, in the same blocks."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file

from wanquant.quant import QTYPES, QuantError, open_gguf
from wanquant.quant.calibration import SPAN, Calibration, CalibrationCollector, Inputs
from wanquant.quant.checkpoint import open_checkpoint
from wanquant.quant.convert import convert
from wanquant.quant.recipe import treatment
from wanquant.quant.wan import wan_shapes
from wanquant.tests.tiny_wan import write_tiny_wan

NAME = "blocks.0.ffn.0.weight"
TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")


def correlated(columns, *, rows=2048, seed=0):
    """Inputs that a few directions explain, their columns of unlike size, as a network's are."""
    model, draw = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    directions = torch.randn(32, columns, generator=model) * (-torch.arange(32) / 10).exp()[:, None]
    scales = (0.7 * torch.randn(columns, generator=model)).exp()
    explained = torch.randn(rows, 32, generator=draw) @ directions
    return (explained / explained.std() + 0.5 * torch.randn(rows, columns, generator=draw)) * scales


def collected(**inputs):
    collector = CalibrationCollector()
    for name, values in inputs.items():
        collector.add(name, values)
    collector.samples = 1
    return collector.result()


@pytest.fixture(scope="module")
def layer():
    """A weight, what its inputs were, and others of the same kind to measure with."""
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(3))
    return weight, Inputs.of(collected(w=correlated(512)), "w"), correlated(512, seed=1)


def output_error(weight, packed, name, inputs):
    wanted = inputs @ weight.t()
    return ((inputs @ QTYPES[name].dequantize(packed).t() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("name", TYPES)
def test_outputs_have_less_error(name, layer):
    weight, known, inputs = layer
    qtype = QTYPES[name]
    plain, weighted, calibrated = (
        output_error(weight, packed, name, inputs)
        for packed in (
            qtype.quantize(weight),
            qtype.quantize(weight, known.importance),
            known.quantize(qtype, weight),
        )
    )
    assert calibrated < 0.8 * weighted
    assert calibrated < 0.65 * plain


@pytest.mark.parametrize("name", ["Q4_0", "Q3_K"])
def test_both_efforts_use_what_is_known(name, layer):
    weight, known, _ = layer
    assert torch.equal(known.quantize(QTYPES[name], weight, "fast"), known.quantize(QTYPES[name], weight))


@pytest.mark.parametrize("name", ["F16", "MXFP4", "TQ2_0"])
def test_types_without_a_search_stay_as_they_are(name, layer):
    weight, known, _ = layer
    assert torch.equal(known.quantize(QTYPES[name], weight, "fast"), QTYPES[name].quantize(weight, effort="fast"))


@pytest.mark.parametrize("name", ["Q4_0", "Q3_K", "Q4_K", "IQ4_XS"])
def test_uncorrelated_inputs_leave_the_nearest_codes(name, layer):
    weight = layer[0]
    importance = torch.rand(512, generator=torch.Generator().manual_seed(0)) + 0.1
    products = torch.diag_embed(importance.view(2, 256))
    known = Inputs.of(Calibration({"w": importance}, {"w": 1.0}, 1, products={"w": products}), "w")
    assert torch.equal(known.quantize(QTYPES[name], weight), QTYPES[name].quantize(weight, importance))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K"])
def test_bytes_do_not_depend_on_other_rows(name, layer):
    weight, known, _ = layer
    before = weight.clone()
    parts = [known.quantize(QTYPES[name], part) for part in weight.split([1, 10, 53])]
    assert torch.equal(torch.cat(parts), known.quantize(QTYPES[name], weight))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("inputs", [torch.zeros(8, 512), torch.ones(1, 512)], ids=["zero", "one row"])
def test_inputs_that_say_little_do_no_harm(inputs, layer):
    weight, known = layer[0], Inputs.of(collected(w=inputs), "w")
    qtype = QTYPES["Q4_K"]
    error = qtype.dequantize(known.quantize(qtype, weight)) - weight
    assert error.square().mean() < 0.03


def test_products_of_neighbouring_columns():
    first, second = torch.randn(2, 3, 512).bfloat16(), torch.randn(5, 512)
    collector = CalibrationCollector()
    collector.add("w", first)
    collector.add("w", second, weight=0.5)
    calibration = collector.result()
    rows = torch.cat((first.float().view(6, 512), second * 0.5**0.5))
    wanted = torch.stack([part.t() @ part for part in rows.split(256, 1)])
    torch.testing.assert_close(calibration.products["w"], wanted)
    assert calibration.counts["w"] == 8.5
    torch.testing.assert_close(calibration["w"], rows.square().sum(0) / 8.5)


def test_narrow_layers_have_narrow_products():
    calibration = collected(w=torch.randn(4, 96))
    assert calibration.products["w"].shape == (3, 32, 32)
    weight = torch.randn(4, 96)
    assert Inputs.of(calibration, "w").quantize(QTYPES["IQ4_NL"], weight).shape == (4, 3 * 18)


def test_some_rows_of_many_are_enough():
    collector = CalibrationCollector()
    inputs = torch.arange(3000.0)[:, None].expand(-1, 32)
    collector.add("w", inputs)
    collector.samples = 1
    collector.add("w", inputs)
    calibration = collector.result()
    assert calibration.counts["w"] == 2000
    every_third = torch.arange(3000.0)[0::3].square().sum() + torch.arange(3000.0)[1::3].square().sum()
    torch.testing.assert_close(calibration.sums["w"], every_third.expand(32))


def test_size_at_14b():
    widths = {name: shape[-1] for name, shape in wan_shapes("14B").items() if len(shape) == 2}
    collected = sum(width * SPAN * 4 for width in widths.values()) / 2**30
    shared = sum(
        width * SPAN * 4 for name, width in widths.items() if re.search("self_attn.[kv]|cross_attn.[kv]", name)
    )
    assert 2.2 < collected < 2.35, "GiB of main memory"
    assert 1.45 < collected - shared / 2**30 < 1.55, "GiB of the file"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_named(value):
    with pytest.raises(QuantError, match=r"b: its inputs hold NaN or infinity"):
        collected(a=torch.ones(2, 32), b=torch.full((2, 32), value))


def test_products_of_no_inputs_are_refused():
    products = torch.tensor([[[1.0, 2.0], [2.0, 1.0]]])
    calibration = Calibration({"w": torch.ones(2)}, {"w": 1.0}, 1, "c.safetensors", products={"w": products})
    with pytest.raises(QuantError, match=r"c\.safetensors: tensor w: is no sum of products"):
        calibration.feedback("w")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_tiny_wan(tmp_path_factory.mktemp("source") / "wan.safetensors", layers=1, ffn_dim=512)


@pytest.fixture(scope="module")
def calibration(source):
    """Of every matrix."""
    with open_checkpoint(source) as checkpoint:
        widths = {n: t.shape[-1] for n, t in checkpoint.tensors.items() if treatment(n, t) == "quantized"}
    collector = CalibrationCollector()
    for name, width in widths.items():
        collector.add(name, correlated(width))
    collector.samples = 3
    return collector.result()


def test_file_is_calibrated_and_says_so(tmp_path, source, calibration):
    state = load_file(source)
    weighted = convert(source, tmp_path / "w.gguf", "Q4_K_S", effort="fast", importance=dict(calibration))
    calibrated = convert(source, tmp_path / "c.gguf", "Q4_K_S", effort="fast", importance=calibration)
    assert calibrated.metadata["wanquant.calibrated"] and "wanquant.calibrated" not in weighted.metadata
    assert calibrated.metadata["quantize.imatrix.chunks_count"] == 3
    types = [[tensor.qtype for tensor in open_gguf(report.path).tensors.values()] for report in (weighted, calibrated)]
    assert types[0] == types[1]
    for name in calibration:
        inputs, weight = correlated(state[name].shape[-1], rows=256, seed=1), state[name].float()
        errors = [
            ((open_gguf(report.path).tensors[name].dequantize() - weight) @ inputs.t()).norm()
            for report in (weighted, calibrated)
        ]
        assert errors[1] < 0.8 * errors[0]


def test_calibrated_file_is_reused_by_the_same_job_only(tmp_path, source, calibration):
    path = tmp_path / "a.gguf"
    one = Calibration({NAME: calibration.sums[NAME]}, {NAME: 1.0}, 1, products={NAME: calibration.products[NAME]})
    convert(source, path, "Q4_K_S", effort="fast", importance=one)
    assert convert(source, path, "Q4_K_S", effort="fast", importance=one).reused
    with pytest.raises(QuantError, match="made in another way"):
        convert(source, path, "Q4_K_S", effort="fast", importance=dict(one))


def test_calibration_of_another_model_is_refused(tmp_path, source):
    other = collected(**{"blocks.7.ffn.0.weight": torch.ones(2, 256)})
    with pytest.raises(QuantError, match=r"blocks\.7\.ffn\.0\.weight: not in this model"):
        convert(source, tmp_path / "a.gguf", importance=other)
    with pytest.raises(QuantError, match=r"blocks\.0\.ffn\.0\.weight: \(512,\) columns, but \(256,\)"):
        convert(source, tmp_path / "a.gguf", importance=collected(**{NAME: torch.ones(2, 512)}))
    assert not list(tmp_path.iterdir())
