"""Calibrations: collecting them, and conversions that have less error in the outputs with the same types."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from wanquant.quant import QuantError, open_gguf
from wanquant.quant.conversion.convert import convert
from wanquant.quant.conversion.layer_encoder import LayerEncoder
from wanquant.quant.gguf.provenance import CALIBRATED, CALIBRATION_SHA256, fingerprint
from wanquant.quant.plan.recipe import required_precision
from wanquant.quant.plan.wan_shapes import wan_shapes
from wanquant.quant.sources.checkpoint import open_checkpoint
from wanquant.quant.statistics.calibration import SPAN, Calibration, CalibrationCollector
from wanquant.quant.statistics.held_out import TOKENS, HeldOut
from wanquant.quant.statistics.importance import Importance
from wanquant.quant.statistics.leading_factors import RANK
from wanquant.testing.tiny_wan import write_tiny_wan
from wanquant.tests.quant.samples import collected, correlated

NAME = "blocks.0.ffn.0.weight"


def test_products_are_blocks_of_the_gram_matrix():
    first, second = torch.randn(2, 3, 512).bfloat16(), torch.randn(5, 512)
    collector = CalibrationCollector()
    collector.add("w", first)
    collector.add("w", second, weight=0.5)
    calibration = collector.result()
    rows, weights = torch.cat((first.float().view(6, 512), second)), torch.tensor([1.0] * 6 + [0.5] * 5)
    weights *= ~is_held_out(rows, calibration.held_out["w"])
    count, weighted = weights.sum().item(), rows * weights[:, None]
    wanted = torch.stack([a.t() @ b for a, b in zip(rows.split(256, 1), weighted.split(256, 1), strict=True)])
    torch.testing.assert_close(calibration.products["w"], wanted)
    assert calibration.counts["w"] == count
    torch.testing.assert_close(calibration["w"], (rows * weighted).sum(0) / count)
    torch.testing.assert_close(calibration.mean("w"), weighted.sum(0) / count)


def is_held_out(rows, held_out):
    """Return which rows are among the held-out tokens: float32 (rows, columns), bfloat16 (tokens, columns)."""
    return (rows.bfloat16()[:, None] == held_out).all(2).any(1)


def test_a_held_out_token_is_in_no_sum_however_often_it_comes():
    collector, tokens = CalibrationCollector(), torch.randn(1000, 512)
    for _ in range(3):
        collector.add("w", tokens)
    calibration = collector.result()
    kept = ~is_held_out(tokens, calibration.held_out["w"])
    assert len(calibration.held_out["w"]) == 64
    assert calibration.counts["w"] == 3 * kept.sum() == 3 * 936
    torch.testing.assert_close(calibration["w"], tokens[kept].square().mean(0))


def test_held_out_tokens_are_those_of_the_least_hashes_of_all_calls():
    calls = torch.randn(8, 500, 512)
    together, one_by_one = CalibrationCollector(), CalibrationCollector()
    for call in calls:
        one_by_one.add("w", call)
    for pair in calls.view(4, 1000, 512):
        together.add("w", pair)
    sets = [{tuple(row.tolist()) for row in each.result().held_out["w"]} for each in (together, one_by_one)]
    assert len(sets[0]) == 64 and sets[0] == sets[1]


def test_call_of_held_out_tokens_alone_adds_nothing():
    """The time embedding of Wan 2.2 5B gets the times of all frames, then, in a video from text alone, one of them."""
    tokens = torch.randn(200, 512)
    collector = CalibrationCollector()
    collector.add("w", tokens)
    before = collector.result()
    collector.add("w", tokens[is_held_out(tokens, before.held_out["w"])][:1])
    after = collector.result()
    assert after.counts == before.counts and torch.equal(after.products["w"], before.products["w"])


def test_padding_and_lone_tokens_are_not_held_out():
    padded = torch.cat([torch.zeros(400, 512), torch.randn(112, 512)])
    collector = CalibrationCollector()
    collector.add("padded", padded)
    for token in torch.randn(40, 1, 512):
        collector.add("lone", token)
    held_out = collector.result().held_out
    assert len(held_out["padded"]) and held_out["padded"].any(1).all()
    assert held_out["lone"].shape == (0, 512)


@pytest.fixture
def without_held_out(monkeypatch):
    monkeypatch.setattr(HeldOut, "choose", lambda _, tokens: torch.zeros(len(tokens), dtype=torch.bool))


@pytest.mark.usefixtures("without_held_out")
@pytest.mark.parametrize("columns", [512, 1536, 96])
def test_factors_are_the_leading_part_of_the_covariances(columns):
    collector, inputs = CalibrationCollector(), correlated(columns) + torch.linspace(-3, 3, columns)
    inputs = inputs[:1000]
    for part in inputs.split(500):
        collector.add("w", part)
    calibration = collector.result()
    assert calibration.counts["w"] == 1000
    used = inputs.double()
    wanted = (used - used.mean(0)).t() @ (used - used.mean(0)) / len(used)
    factors = calibration.factors["w"].double()
    values, vectors = torch.linalg.eigh(wanted)
    leading = vectors[:, -factors.shape[1] :]
    best = (leading * values[-factors.shape[1] :]) @ leading.t()
    found = factors @ factors.t()
    assert factors.shape == (columns, 64)
    closest = (wanted - best).norm()
    assert (wanted - found).norm() < 2 * closest + 0.05 * wanted.norm()
    least = torch.linalg.eigvalsh(wanted - 0.999**2 * found).min()
    assert least > -1e-3 * wanted.diagonal().mean()


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("columns", [256, 1024])
def test_moments_are_those_of_the_inputs_within_a_span(centered, columns):
    collector, inputs = CalibrationCollector(), correlated(columns) + 2
    collector.add("w", inputs)
    calibration = collector.result()
    used = inputs[::2]
    used = used[~is_held_out(used, calibration.held_out["w"])].double()
    used = used - used.mean(0) if centered else used
    second = calibration.moments("w", centered=centered)
    n = columns // 256
    blocks = second.blocks + second.factors @ second.factors.mT
    wanted = (used.t() @ used / len(used)).view(n, 256, n, 256)
    torch.testing.assert_close(blocks, torch.stack([wanted[i, :, i] for i in range(n)]), rtol=1e-3, atol=1e-4)
    if n > 1:
        across = second.factors[0] @ second.factors[1].mT
        assert (across - wanted[0, :, 1]).norm() < 0.3 * wanted[0, :, 1].norm()


def test_span_divides_the_input_channels_of_narrow_layers():
    calibration = collected(w=torch.randn(4, 96))
    assert calibration.products["w"].shape == (3, 32, 32)


@pytest.mark.usefixtures("without_held_out")
def test_other_tokens_are_used_in_each_evaluation():
    collector = CalibrationCollector()
    inputs = torch.arange(3000.0)[:, None].expand(-1, 32)
    collector.add("w", inputs)
    collector.samples = 1
    collector.add("w", inputs)
    calibration = collector.result()
    assert calibration.counts["w"] == 2000
    every_third = torch.arange(3000.0)[0::3].square().sum() + torch.arange(3000.0)[1::3].square().sum()
    torch.testing.assert_close(calibration.sums["w"], every_third.expand(32))


def test_size_of_a_calibration_for_14b():
    widths = {name: shape[-1] for name, shape in wan_shapes("14B").items() if len(shape) == 2}
    collected = sum(width * SPAN * 4 for width in widths.values()) / 2**30
    shared = sum(
        width * SPAN * 4 for name, width in widths.items() if re.search("self_attn.[kv]|cross_attn.[kv]", name)
    )
    assert 2.2 < collected < 2.35, "GiB of products in main memory"
    in_file = collected - shared / 2**30
    # Of each channel, in bytes: the products, the sketch or the factors, and the held-out tokens.
    sketched, factors, held_out = (size / (SPAN * 4) for size in (2 * RANK * 4, RANK * 4, TOKENS * 2))
    assert 3.6 < collected * (1 + sketched + held_out) < 3.8, "GiB of main memory"
    assert 2.05 < in_file * (1 + factors + held_out) < 2.15, "GiB of the file"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused_with_their_name(value):
    with pytest.raises(QuantError, match=r"tensor b: its inputs hold NaN or infinity"):
        collected(a=torch.ones(2, 32), b=torch.full((2, 32), value))


def test_products_that_are_not_positive_definite_are_refused():
    products = torch.tensor([[[1.0, 2.0], [2.0, 1.0]]])
    calibration = Calibration({"w": torch.ones(2)}, {"w": 1.0}, 1, "c.safetensors", products={"w": products})
    with pytest.raises(QuantError, match=r"c\.safetensors: tensor w: got a matrix that is not positive definite"):
        LayerEncoder.of(calibration, "w")


@pytest.mark.parametrize("columns", [256, 512])
@pytest.mark.parametrize("rotated", [False, True])
def test_layer_whose_inputs_never_vary_is_rounded_as_without_statistics(columns, rotated):
    collector, token = CalibrationCollector(), torch.randn(1, columns)
    for _ in range(20):  # the time embedding of so many samplings of one step
        collector.add("w", token)
    encoder = LayerEncoder.of(collector.result(), "w", has_bias=True, rotated=rotated)
    matrix = encoder.moments.blocks
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    assert (matrix - torch.diag_embed(diagonal)).abs().max() < 0.01 * diagonal.min()
    assert (encoder.importance >= 0).all()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_tiny_wan(tmp_path_factory.mktemp("source") / "wan.safetensors", layers=1, ffn_dim=512)


@pytest.fixture(scope="module")
def calibration(source):
    """A calibration of every quantized matrix."""
    with open_checkpoint(source) as checkpoint:
        widths = {n: t.shape[-1] for n, t in checkpoint.tensors.items() if required_precision(n, t) == "quantized"}
    collector = CalibrationCollector()
    for name, width in widths.items():
        collector.add(name, correlated(width))
    collector.samples = 3
    return collector.result()


def test_calibrated_file_has_less_output_error_and_records_it(tmp_path, source, calibration):
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


@pytest.fixture
def one(calibration):
    """A calibration of one matrix."""
    return Calibration({NAME: calibration.sums[NAME]}, {NAME: 1.0}, 1, products={NAME: calibration.products[NAME]})


def test_calibrated_file_is_reused_by_the_same_conversion_only(tmp_path, source, one):
    path = tmp_path / "a.gguf"
    convert(source, path, "Q4_K_S", effort="fast", importance=one)
    assert convert(source, path, "Q4_K_S", effort="fast", importance=one).reused
    with pytest.raises(QuantError, match="is not this conversion"):
        convert(source, path, "Q4_K_S", effort="fast", importance=dict(one))
    other = replace(one, products={NAME: torch.diag_embed(one.sums[NAME].view(1, 256))})
    assert fingerprint(other) == fingerprint(one), "only its diagonal is the same"
    with pytest.raises(QuantError, match="is not this conversion"):
        convert(source, path, "Q4_K_S", effort="fast", importance=other)


def test_calibrated_file_of_an_older_version_is_reused(tmp_path, source, one, monkeypatch):
    """It names the diagonal of its calibration only."""
    with monkeypatch.context() as older:
        older.setattr(
            Calibration, "metadata", property(lambda self: {**Importance.metadata.fget(self), CALIBRATED: True})
        )
        old = convert(source, tmp_path / "a.gguf", "Q4_K_S", effort="fast", importance=one)
    assert CALIBRATION_SHA256 not in old.metadata
    report = convert(source, old.path, "Q4_K_S", effort="fast", importance=one)
    assert report.reused and "older" not in report.text()
    rescaled = replace(one, counts={NAME: 2.0})
    with pytest.raises(QuantError, match="is not this conversion"):
        convert(source, old.path, "Q4_K_S", effort="fast", importance=rescaled)


@pytest.mark.parametrize("part", ["products", "totals", "factors", "held_out", "counts"])
def test_every_part_of_a_calibration_changes_its_sha256(part):
    calibration = collected(w=torch.randn(300, 512))
    values = getattr(calibration, part)
    changed = replace(calibration, **{part: {"w": values["w"] * 2}})
    assert changed.sha256 != calibration.sha256 == replace(calibration, samples=7, name="other").sha256
    if part in ("totals", "factors", "held_out"):
        assert replace(calibration, **{part: {}}).sha256 != calibration.sha256


def test_calibration_of_another_model_is_refused(tmp_path, source):
    other = collected(**{"blocks.7.ffn.0.weight": torch.ones(2, 256)})
    with pytest.raises(QuantError, match=r"blocks\.7\.ffn\.0\.weight: not in this model"):
        convert(source, tmp_path / "a.gguf", importance=other)
    with pytest.raises(QuantError, match=r"blocks\.0\.ffn\.0\.weight: has shape \(512,\), expected \(256,\)"):
        convert(source, tmp_path / "a.gguf", importance=collected(**{NAME: torch.ones(2, 512)}))
    assert not list(tmp_path.iterdir())
