"""TQ1_0 and TQ2_0: encoders are bit-equal to ggml's, and lossless for ternary weights."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from wanquant.quant import QTYPES
from wanquant.testing.libggml import LibGGML
from wanquant.tests.quant.samples import WEIGHTS, weights

ternary = pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0"])


@ternary
@pytest.mark.parametrize("kind", [kind for kind in WEIGHTS if kind != "subnormal"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_encoding_is_bit_equal_to_ggml_and_gguf(name: str, kind: str, libggml: LibGGML) -> None:
    weight = weights(kind, 256)
    packed = QTYPES[name].quantize(torch.from_numpy(weight), effort="fast").numpy()
    np.testing.assert_array_equal(packed, libggml.quantize(name, weight))
    np.testing.assert_array_equal(packed, gguf.quants.quantize(weight, GGMLQuantizationType[name]))


@ternary
def test_ternary_weights_are_lossless(name: str) -> None:
    weight = torch.randint(-1, 2, (8, 1024)) * 0.75
    assert weight.unique().numel() == 3
    packed = QTYPES[name].quantize(weight, effort="fast")
    assert torch.equal(QTYPES[name].dequantize(packed), weight)
