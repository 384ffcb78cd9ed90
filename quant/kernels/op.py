"""`torch.ops.wanquant.dequantize(packed, qtype, dtype)`: opaque to torch.compile, which so traces past it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..qtype import QTYPES
from . import eager
from .optional import OptionalPath

# ROCm counts as cuda.
_PATHS = dict.fromkeys(("cuda", "xpu"), OptionalPath("triton_kernel", "fused kernels"))

# Not torch.library.custom_op: its wrappers import torch._dynamo at the first call, which takes seconds.
_library = torch.library.Library("wanquant", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("dequantize(Tensor packed, str qtype, ScalarType dtype) -> Tensor")  # type: ignore[no-untyped-call]


def _dequantize(packed: Tensor, qtype: str, dtype: torch.dtype) -> Tensor:
    if not packed.numel():
        return _fake(packed, qtype, dtype)
    path = _PATHS.get(packed.device.type)
    weight = path.dequantize(QTYPES[qtype], packed, dtype) if path else None
    return eager.dequantize(QTYPES[qtype], packed, dtype) if weight is None else weight


def _fake(packed: Tensor, qtype: str, dtype: torch.dtype) -> Tensor:
    return packed.new_empty(QTYPES[qtype].unpacked_shape(tuple(packed.shape)), dtype=dtype)


_library.impl("dequantize", _dequantize, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("wanquant::dequantize", _fake, lib=_library)
