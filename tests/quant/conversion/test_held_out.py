"""Held-out tokens: a calibration that knows too little is not trusted."""

from __future__ import annotations

import pytest
import torch

from wanquant.quant import QTYPES
from wanquant.quant.conversion.layer_encoder import LayerEncoder
from wanquant.quant.statistics.calibration import CalibrationCollector
from wanquant.tests.quant.samples import correlated

# Tokens of a caption, of which a word is one.
CAPTION = 13


def known_from(captions, columns=512):
    """Return the encoder of a layer whose calibration saw so many captions, each several times."""
    collector, tokens = CalibrationCollector(), correlated(columns, rows=captions * CAPTION)
    for caption in tokens.split(CAPTION):
        for _ in range(3):
            collector.add("w", caption)
    return LayerEncoder.of(collector.result(), "w")


def error(encoder, weight, name):
    """Return the error of the outputs for inputs of the same kind that no calibration saw."""
    packed = encoder.quantize(QTYPES[name], weight)
    return ((QTYPES[name].dequantize(packed) - weight) @ correlated(weight.shape[1], seed=5).t()).norm().item()


@pytest.mark.parametrize("name", ["Q2_K", "Q4_0", "Q4_K"])
@pytest.mark.parametrize("captions", [1, 10, 100])
def test_a_calibration_of_few_tokens_is_not_worse_than_its_importance(captions, name):
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(3))
    encoder = known_from(captions)
    tried = encoder.tried(QTYPES[name], weight[::2])
    assert error(tried, weight, name) <= 1.001 * error(encoder._replace(moments=None), weight, name)
    if captions == 100:
        assert tried.moments is encoder.moments


def test_a_calibration_that_does_not_help_is_not_used():
    weight, encoder = torch.randn(64, 512), known_from(100)
    # The directions in which the rounding may err are those that the held-out tokens have.
    matrices = [turn.moments.matrix[0] for turn in encoder.moments.turns]
    least = torch.cat([torch.linalg.eigh(matrix).eigenvectors[:, :8].mT for matrix in matrices], 1)
    other = encoder._replace(held_out=least.float())
    assert other.tried(QTYPES["Q2_K"], weight).moments is None
    assert encoder.tried(QTYPES["Q2_K"], weight).moments is encoder.moments
    assert encoder._replace(held_out=torch.zeros(0, 512)).tried(QTYPES["Q2_K"], weight).moments is None
    assert encoder._replace(held_out=None).tried(QTYPES["Q2_K"], weight).moments is encoder.moments


def test_fewer_tokens_get_more_damping():
    few, many = (known_from(captions).moments.blocks for captions in (3, 200))
    shares = [(torch.linalg.eigvalsh(b)[:, 0] / b.diagonal(dim1=1, dim2=2).mean(1)).max() for b in (few, many)]
    assert shares[0] > 5 * shares[1]
