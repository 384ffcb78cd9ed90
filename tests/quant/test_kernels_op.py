"""torch.ops.wanquant.dequantize: what torch asks of an operator, and every path behind it."""

from __future__ import annotations

import pytest
import torch

from wanquant.quant import QTYPES, QuantType
from wanquant.tests.quant.samples import random_blocks

every_type = pytest.mark.parametrize("quant", QTYPES.values(), ids=QTYPES.keys())


@every_type
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(quant: QuantType, dtype: torch.dtype) -> None:
    packed = (random_blocks(quant, 6) & 63).view(2, -1)  # finite scales: opcheck compares NaN as unequal
    torch.library.opcheck(torch.ops.wanquant.dequantize.default, (packed, quant.name, dtype))


def test_fake_tensors_decode_to_the_right_shape() -> None:
    packed = torch.empty(3, 5, 288, dtype=torch.uint8, device="meta")
    weight = QTYPES["Q4_K"].dequantize(packed, torch.float16)
    assert (weight.shape, weight.dtype, weight.device.type) == ((3, 5, 512), torch.float16, "meta")
