"""MXFP4 and NVFP4: every scale and every code dequantizes to ggml's bits, and MXFP4 encodes to gguf's bytes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from wanquant.quant import QTYPES
from wanquant.quant.formats.microscaling import KVALUES
from wanquant.testing.libggml import LibGGML
from wanquant.tests.quant.samples import WEIGHTS, assert_same_bits, weights

ALL_CODES = [*range(0x00, 0x80, 0x11), *range(0x88, 0x100, 0x11)]


def test_every_mxfp4_scale_and_code_is_bit_exact(libggml: LibGGML) -> None:
    blocks = torch.tensor([[e, *ALL_CODES] for e in range(256)], dtype=torch.uint8)
    weight = QTYPES["MXFP4"].dequantize(blocks)
    assert_same_bits(weight.numpy(), libggml.dequantize("MXFP4", blocks.numpy()))
    assert weight[127].tolist() == [value / 2 for value in KVALUES] * 2


def test_every_nvfp4_scale_and_code_is_bit_exact(libggml: LibGGML) -> None:
    blocks = torch.tensor([[d, 0x38, 0x7E, 0x7F, *ALL_CODES, *ALL_CODES] for d in range(256)], dtype=torch.uint8)
    weight = QTYPES["NVFP4"].dequantize(blocks)
    assert_same_bits(weight.numpy(), libggml.dequantize("NVFP4", blocks.numpy()))
    assert weight[0, :16].abs().max() == weight[0, 48:].abs().max() == 0
    assert weight[0, 16:48].unique().numel() > 8


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_mxfp4_encoding_is_bit_equal_to_gguf(kind: str) -> None:
    weight = weights(kind, 32)
    packed = QTYPES["MXFP4"].quantize(torch.from_numpy(weight), effort="fast").numpy()
    np.testing.assert_array_equal(packed, gguf.quants.quantize(weight, GGMLQuantizationType.MXFP4))
