"""`torch.ops.wanquant.dequantize(packed, qtype, dtype)`: opaque to torch.compile, which so traces past it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..qtype import QTYPES
from . import eager

# Not torch.library.custom_op: its wrappers import torch._dynamo at the first call, which takes seconds.
_library = torch.library.Library("wanquant", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("dequantize(Tensor packed, str qtype, ScalarType dtype) -> Tensor")  # type: ignore[no-untyped-call]


def _dequantize(packed: Tensor, qtype: str, dtype: torch.dtype) -> Tensor:
    return eager.dequantize(QTYPES[qtype], packed, dtype) if packed.numel() else _fake(packed, qtype, dtype)


def _fake(packed: Tensor, qtype: str, dtype: torch.dtype) -> Tensor:
    return packed.new_empty(QTYPES[qtype].unpacked_shape(tuple(packed.shape)), dtype=dtype)


_library.impl("dequantize", _dequantize, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("wanquant::dequantize", _fake, lib=_library)
