"""Native formats rounded for the outputs of a layer: one algorithm, the formats' own grids, kitchen's own decoding."""

from __future__ import annotations

import pytest
import torch

from wanquant.bench.native import GOALS, rows
from wanquant.quant.conversion.layer_encoder import LayerEncoder
from wanquant.quant.encoders.native import RoundingForOutputs
from wanquant.quant.encoders.rounding import BEST, THOROUGH, Thoroughness
from wanquant.quant.native.layer_type import LayerType
from wanquant.quant.native.rotation import rotate
from wanquant.quant.statistics.calibration import CalibrationCollector, SecondMoments
from wanquant.tests.quant.native.kitchen import DECODE
from wanquant.tests.quant.native.test_native import FORMATS, every_format, normal, outlier_columns
from wanquant.tests.quant.samples import collected, correlated

COLUMNS = 256
"""The channels of one span: with several, the rounding of a turn depends on the luck of the one before."""


@pytest.fixture(scope="module")
def known():
    return collected(w=correlated(COLUMNS))


def encoder_of(name, known):
    return LayerEncoder.of(known, "w", rotated=FORMATS[name].rotates)


def rounded(name, weight, known, how=BEST):
    encoder = encoder_of(name, known)
    return FORMATS[name].encode(weight, rounding=RoundingForOutputs(encoder.importance, encoder.moments, how))


def cost(name, weight, parts, known):
    """Return the squared error of the outputs under the damped products."""
    error = FORMATS[name].decode(parts, tuple(weight.shape)) - weight
    moments = encoder_of(name, known).moments
    if FORMATS[name].rotates:
        error = rotate(error)
    error = error.double().view(len(weight), len(moments.blocks), -1).transpose(0, 1)
    return float(((error @ moments.blocks) * error).sum() + (error @ moments.factors).sum(0).square().sum())


@every_format
def test_every_stage_lowers_the_error(name, known):
    weight = normal(16, COLUMNS, seed=3)

    def after(neighbors, sweeps):
        return cost(name, weight, rounded(name, weight, known, Thoroughness(neighbors, sweeps)), known)

    plain = cost(name, weight, FORMATS[name].encode(weight), known)
    feedback, one, two = (after(False, sweeps) for sweeps in (0, 1, 2))
    assert feedback < 0.8 * plain
    assert one < feedback and two <= one * 1.001
    assert after(True, 0) <= feedback * 1.02


@pytest.mark.parametrize("name", [name for name in FORMATS if FORMATS[name].rotates])
def test_scales_of_rows_are_those_of_least_squares(name, known):
    weight = normal(8, COLUMNS, seed=3)
    parts, scale = rounded(name, weight, known), "weight_scale" if "INT" in name else "weight_s_channel"
    least = cost(name, weight, parts, known)
    for factor in (0.999, 1.001):
        assert cost(name, weight, parts | {scale: parts[scale] * factor}, known) > least


KINDS = {
    "normal": normal(24, COLUMNS),
    "outlier columns": outlier_columns()[:24, :COLUMNS].contiguous(),
    "zeros and one": torch.cat([torch.zeros(3, COLUMNS), torch.eye(3, COLUMNS) * 1e4]),
    "constant rows": normal(8, 1).expand(8, COLUMNS).contiguous(),
    "tiny": normal(4, COLUMNS) * 1e-37,
    "huge": normal(4, COLUMNS) * 1e30,
}


@pytest.mark.parametrize("weight", KINDS.values(), ids=KINDS.keys())
@every_format
def test_kitchen_decodes_the_same_bits(name, weight, known):
    parts, shape = rounded(name, weight, known, Thoroughness(neighbors=True, sweeps=1)), tuple(weight.shape)
    values = FORMATS[name].decode(parts, shape)
    assert values.isfinite().all()
    assert torch.equal(values.view(torch.int32), DECODE[name](parts, shape).contiguous().view(torch.int32))
    assert (values[(weight == 0).all(1)] == 0).all()
    for part in FORMATS[name].parts(shape):
        assert parts[part.suffix].shape == part.shape


@pytest.mark.parametrize("kind", ["normal", "outlier columns", "constant rows", "huge"])
@every_format
def test_no_kind_of_weight_is_rounded_worse(name, kind, known):
    weight = KINDS[kind]
    unit = float(weight.abs().max())
    ours, plain = (
        cost(name, weight / unit, dict(parts), known)
        for parts in (rounded(name, weight / unit, known), FORMATS[name].encode(weight / unit))
    )
    assert ours <= plain * 1.0001 + 1e-12


@pytest.fixture(scope="module")
def known_of_two_spans():
    return collected(w=correlated(2 * COLUMNS))


@every_format
def test_rows_do_not_depend_on_other_rows_or_threads(name, known_of_two_spans):
    weight, encoder, threads = normal(9, 2 * COLUMNS), encoder_of(name, known_of_two_spans), torch.get_num_threads()
    rounding = RoundingForOutputs(encoder.importance, encoder.moments, Thoroughness(neighbors=True, sweeps=1))
    weight = weight * (40 if name in ("FP8", "W4A8", "W4A8_G32", "W6A8", "INT8") else 2)
    whole = rounding(FORMATS[name], weight)
    try:
        torch.set_num_threads(3 - min(threads, 2))
        alone = rounding(FORMATS[name], weight[2:3])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(part, of_all[2:3]) for part, of_all in zip(alone, whole, strict=True))


@pytest.mark.parametrize("how", [BEST, THOROUGH])
def test_every_row_of_int8_has_the_largest_code(how, known):
    weight = torch.cat([normal(20, COLUMNS), outlier_columns()[:20, :COLUMNS]])
    codes = rounded("INT8", weight, known, how)["weight"]
    assert (codes.abs().amax(1) == 127).all() and codes.min() >= -127


def test_moments_of_rotated_inputs():
    generator = torch.Generator().manual_seed(0)
    moments = SecondMoments(*(torch.randn(2, 256, n, generator=generator, dtype=torch.float64) for n in (256, 5)))
    moments = SecondMoments(moments.blocks @ moments.blocks.mT, moments.factors)

    def whole(second):
        factors = second.factors.flatten(0, 1)
        return torch.block_diag(*second.blocks) + factors @ factors.mT

    turn = rotate(torch.eye(512, dtype=torch.float64))
    torch.testing.assert_close(whole(moments.rotated()), turn @ whole(moments) @ turn)
    torch.testing.assert_close(moments.rotated().diagonal(), whole(moments.rotated()).diagonal())


def test_importance_alone_lowers_the_error_of_formats_that_rotate():
    weight, known, others = normal(32, COLUMNS, seed=3), collected(w=correlated(COLUMNS)), correlated(COLUMNS, seed=5)
    for name, format in FORMATS.items():
        qtype = LayerType(format, (32, COLUMNS))
        encoders = (LayerEncoder(), LayerEncoder.of({"w": known["w"]}, "w", rotated=format.rotates))
        plain, informed = (
            float(((qtype.dequantize(each.quantize(qtype, weight)) - weight) @ others.t()).norm()) for each in encoders
        )
        assert informed < 0.85 * plain if format.rotates else informed <= plain, name


def test_goals_are_reached():
    """The columns are fewer than those of `bench native`, and the plain errors almost the same."""
    for row in rows(columns=1024, n_rows=48, efforts=("best",)):
        name = row["format"]
        assert row["best_exact"] < 0.9 * row["searched_exact"] and row["best_quantized"] < row["searched_quantized"]
        if name in GOALS:
            assert row["best_quantized"] <= GOALS[name].quantized
            assert row["best_exact"] <= (GOALS[name].exact or 100)


@pytest.mark.parametrize("name", ["INT8", "W4A8", "NVFP4", "MXFP8"])
@pytest.mark.parametrize("captions", [1, 10, 100])
def test_a_calibration_of_few_tokens_does_no_harm(name, captions):
    collector = CalibrationCollector()
    for caption in correlated(COLUMNS, rows=13 * captions).split(13):
        collector.add("w", caption)
    weight, others = normal(64, COLUMNS, seed=3), correlated(COLUMNS, seed=5)
    qtype, encoder = LayerType(FORMATS[name], (64, COLUMNS)), encoder_of(name, collector.result())

    def error(encoder):
        return float(((qtype.dequantize(encoder.quantize(qtype, weight)) - weight) @ others.t()).norm())

    tried = encoder.tried(qtype, weight[::2])
    assert error(tried) <= 1.001 * error(encoder._replace(moments=None))
    if captions == 100:
        assert tried.moments is encoder.moments


def test_spans_that_do_not_fit_the_groups_are_rounded_without_moments():
    """Rows of 40 have spans of 8, and NVFP4 has groups of 16."""
    weight, qtype = normal(4, 40), LayerType(FORMATS["NVFP4"], (4, 40))
    encoder = LayerEncoder.of(collected(w=torch.randn(64, 40)), "w")
    expected = encoder._replace(moments=None).quantize(qtype, weight)
    assert not encoder.rounds(qtype) and torch.equal(encoder.quantize(qtype, weight), expected)
