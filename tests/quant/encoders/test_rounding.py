"""Rounding for the outputs of a layer: every stage lowers the error, and the sums are exact."""

from __future__ import annotations

import pytest
import torch

from wanquant.quant import QTYPES
from wanquant.quant.conversion.layer_encoder import LayerEncoder
from wanquant.quant.encoders.rounding import Thoroughness, feedback, round_for_outputs
from wanquant.quant.encoders.rounding.exact import exact_product, rounded_matrix
from wanquant.tests.quant.samples import collected, correlated

IQ = ("IQ1_S", "IQ1_M", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")  # IQ2_XXS is IQ2_XS with longer sub-blocks
TYPES = ("Q4_0", "Q4_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ4_NL", "IQ4_XS", *IQ)


@pytest.fixture(scope="module")
def layer():
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(3))
    return weight, LayerEncoder.of(collected(w=correlated(256)), "w")


def cost(weight, packed, qtype, moments):
    """Return the mean squared error of the outputs, float64."""
    error = (qtype.dequantize(packed) - weight).double().view(len(weight), len(moments.blocks), -1).transpose(0, 1)
    within, across = ((error @ moments.blocks) * error).sum(), (error @ moments.factors).sum(0).square().sum()
    return (within + across) / len(weight)


@pytest.mark.parametrize("name", TYPES)
def test_every_stage_lowers_the_error(name, layer):
    weight, encoder = layer
    qtype, moments, importance = QTYPES[name], encoder.moments, encoder.importance

    def rounded(neighbors, sweeps):
        how = Thoroughness(neighbors, sweeps)
        weights = importance.expand_as(weight).contiguous()
        packed = round_for_outputs(qtype.best, qtype.block_size, weight, weights, moments, how)
        return cost(weight, packed, qtype, moments)

    plain = cost(weight, qtype.quantize(weight, importance), qtype, moments)
    first, *later = [rounded(False, sweeps) for sweeps in (0, 1, 2)]
    assert first < plain
    assert later[0] < first and later[1] <= later[0] * 1.001
    assert rounded(True, 0) <= first * 1.02


@pytest.mark.parametrize("name", ["Q4_K", "IQ2_XS", "IQ1_S"])
def test_scales_tried_in_one_call_or_each_alone_give_the_same_bytes(name, layer, monkeypatch):
    weight, encoder = layer
    together = encoder.quantize(QTYPES[name], weight, "thorough")
    monkeypatch.setattr(feedback, "elements_at_a_time", lambda _: 1)
    assert torch.equal(encoder.quantize(QTYPES[name], weight, "thorough"), together)


def test_products_are_exact_in_any_order():
    generator = torch.Generator().manual_seed(0)
    matrix = rounded_matrix(torch.randn(2, 200, 256, generator=generator).exp())
    values = torch.randn(2, 256, 7, generator=generator) * torch.logspace(-6, 6, 7)
    product = exact_product(matrix, values)
    order = torch.randperm(256, generator=generator)
    assert torch.equal(exact_product(matrix[:, :, order], values[:, order]), product)
    assert torch.equal(torch.cat([exact_product(matrix, v) for v in values.split(1, 2)], 2), product)
    expected = matrix @ values.double()
    assert ((product - expected).abs() <= 2e-6 * (matrix.abs() @ values.double().abs())).all()


@pytest.mark.parametrize("name", ["Q4_0", "Q2_K", "Q4_K", "IQ4_XS", *IQ])
def test_weights_without_variety(name):
    kinds = (torch.zeros(1, 256), torch.full((1, 256), 0.25), torch.eye(3, 256) * 1e4)
    encoder = LayerEncoder.of(collected(w=correlated(256)), "w")
    qtype, weight, rows = QTYPES[name], torch.cat(kinds), [len(kind) for kind in kinds]
    packed = encoder.quantize(qtype, weight, "thorough"), qtype.quantize(weight, encoder.importance)
    for kind, thorough, plain in zip(kinds, *(each.split(rows) for each in packed), strict=True):
        costs = [cost(kind, each, qtype, encoder.moments) for each in (thorough, plain)]
        assert costs[0] <= costs[1] * 1.0001 + 1e-12
