"""The encoder of a layer: statistics of the inputs reduce the error of the outputs at the same types."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from wanquant.quant import QTYPES
from wanquant.quant.conversion import layer_encoder
from wanquant.quant.conversion.layer_encoder import LayerEncoder
from wanquant.quant.encoders.rounding import Thoroughness
from wanquant.quant.statistics.calibration import Calibration
from wanquant.tests.quant.samples import collected, correlated

TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
ON_GRIDS = ("IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")


@pytest.fixture(scope="module")
def layer():
    """A weight, its encoder with a calibration, and other inputs of the same distribution to measure with."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    return weight, LayerEncoder.of(collected(w=correlated(256)), "w"), correlated(256, seed=1)


def output_error(weight, packed, name, inputs):
    wanted = inputs @ weight.t()
    return ((inputs @ QTYPES[name].dequantize(packed).t() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("name", (*TYPES, *ON_GRIDS))
def test_statistics_reduce_the_error_of_the_outputs(name, layer):
    weight, encoder, inputs = layer
    qtype = QTYPES[name]
    plain, weighted, calibrated = (
        output_error(weight, packed, name, inputs)
        for packed in (
            qtype.quantize(weight),
            qtype.quantize(weight, encoder.importance),
            encoder.quantize(qtype, weight),
        )
    )
    assert calibrated < 0.8 * weighted
    assert calibrated < 0.65 * plain


@pytest.mark.parametrize("name", ["Q4_0", "Q3_K"])
def test_both_efforts_use_the_calibration(name, layer):
    weight, encoder, _ = layer
    assert torch.equal(encoder.quantize(QTYPES[name], weight, "fast"), encoder.quantize(QTYPES[name], weight))


@pytest.mark.parametrize("name", TYPES)
def test_thorough_is_no_worse_than_best_where_inputs_are_known(name, layer):
    weight, encoder, inputs = layer
    qtype = QTYPES[name]
    best, thorough = (
        output_error(weight, encoder.quantize(qtype, weight, effort), name, inputs) for effort in ("best", "thorough")
    )
    assert thorough < 1.01 * best
    weighted = LayerEncoder(encoder.importance)
    assert torch.equal(weighted.quantize(qtype, weight, "thorough"), weighted.quantize(qtype, weight, "best"))


@pytest.mark.parametrize("name", ["F16", "MXFP4", "TQ2_0"])
def test_types_without_a_search_ignore_the_calibration(name, layer):
    weight, encoder, _ = layer
    assert torch.equal(encoder.quantize(QTYPES[name], weight, "fast"), QTYPES[name].quantize(weight, effort="fast"))


@pytest.mark.parametrize("name", TYPES)
def test_uncorrelated_inputs_give_no_more_error_than_importance(name, layer):
    weight, qtype = layer[0], QTYPES[name]
    importance = torch.rand(256, generator=torch.Generator().manual_seed(0)) + 0.1
    products = torch.diag_embed(importance.view(1, 256))
    encoder = LayerEncoder.of(Calibration({"w": importance}, {"w": 1.0}, 1, products={"w": products}), "w")
    errors = [
        ((qtype.dequantize(packed) - weight).square() * importance).sum()
        for packed in (encoder.quantize(qtype, weight), qtype.quantize(weight, importance))
    ]
    # Scales of coarse types begin with other weights: see `error_weights`.
    assert errors[0] <= errors[1] * (1.02 if qtype.bits_per_weight < 3 else 1.0001)


# One type of each kind: with one scale, with a min, with integer scales, with both, with a codebook, and with grids.
KINDS = ("Q4_0", "Q4_1", "Q6_K", "Q2_K", "IQ4_XS", "IQ3_S", "IQ2_XS", "IQ1_S")


@pytest.fixture(scope="module")
def two_spans():
    return LayerEncoder.of(collected(w=correlated(512)), "w")


@pytest.mark.parametrize("name", KINDS)
def test_bytes_depend_on_neither_other_rows_nor_threads(name, two_spans, monkeypatch):
    """Effort "thorough" does all that "best" does; two sweeps show what each of six does."""
    monkeypatch.setattr(layer_encoder, "THOROUGH", Thoroughness(neighbors=True, sweeps=2))
    weight = torch.randn(6, 512, generator=torch.Generator().manual_seed(3))
    before, threads = weight.clone(), torch.get_num_threads()
    whole = two_spans.quantize(QTYPES[name], weight, "thorough")
    try:
        torch.set_num_threads(3 - min(threads, 2))
        alone = two_spans.quantize(QTYPES[name], weight[2:3], "thorough")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone, whole[2:3])
    assert torch.equal(weight, before)


@pytest.mark.parametrize("has_held_out", [False, True])
def test_what_is_known_of_the_inputs_does_not_depend_on_threads(has_held_out):
    calibration, threads, found = collected(w=correlated(1024)), torch.get_num_threads(), []
    assert len(calibration.held_out["w"])
    if not has_held_out:
        calibration = replace(calibration, held_out={})
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            turns = LayerEncoder.of(calibration, "w").moments.turns
            parts = [(turn.moments.exact, turn.moments.feedback, turn.factors, turn.answer) for turn in turns]
            found.append([part for each in parts for part in each])
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for others in found[1:] for one, other in zip(found[0], others, strict=True))


@pytest.mark.parametrize("inputs", [torch.zeros(8, 256), torch.ones(1, 256)], ids=["zero", "one row"])
def test_inputs_without_information_do_not_increase_the_error(inputs, layer):
    weight, encoder = layer[0], LayerEncoder.of(collected(w=inputs), "w")
    qtype = QTYPES["Q4_K"]
    error = qtype.dequantize(encoder.quantize(qtype, weight)) - weight
    assert error.square().mean() < 0.03


def test_rows_narrower_than_a_span_are_encoded():
    encoder, weight = LayerEncoder.of(collected(w=torch.randn(4, 96)), "w"), torch.randn(4, 96)
    assert encoder.quantize(QTYPES["IQ4_NL"], weight).shape == (4, 3 * 18)


@pytest.mark.parametrize("name", ON_GRIDS)
def test_importance_reduces_the_error_of_types_with_grids(name, layer):
    weight, encoder, inputs = layer
    qtype, informed = QTYPES[name], LayerEncoder(encoder.importance)
    plain, weighted = (each.quantize(qtype, weight) for each in (LayerEncoder(), informed))
    assert output_error(weight, weighted, name, inputs) < output_error(weight, plain, name, inputs)
    for packed, importance in ((plain, torch.ones(256)), (weighted, encoder.importance)):
        products = (weight * importance * qtype.dequantize(packed)).sum(1)
        torch.testing.assert_close(products, (weight * importance * weight).sum(1), rtol=2**-9, atol=0)


@pytest.mark.parametrize("name", ON_GRIDS)
def test_bytes_of_types_with_grids_do_not_depend_on_other_rows(name, layer):
    weight, encoder, _ = layer
    informed = LayerEncoder(encoder.importance)
    whole = informed.quantize(QTYPES[name], weight)
    assert torch.equal(informed.quantize(QTYPES[name], weight[5:9]), whole[5:9])
