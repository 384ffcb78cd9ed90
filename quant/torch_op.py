"""`torch.ops.wanquant.dequantize(packed, qtype, dtype)`: opaque to torch.compile, which so traces past it."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import QuantError
from .kernels import eager
from .kernels.optional import FUSED, GGML
from .qtype import QTYPES

# ROCm's device type is cuda, too.
_PATHS = {"cuda": FUSED, "xpu": FUSED, "cpu": GGML}


def dequantize_into(packed: Tensor, qtype: str, out: Tensor) -> None:
    """Decode uint8 (..., n_blocks * type_size), of any strides, into `out`, contiguous, of as many weights.

    Raises:
        QuantError: other bytes or another output than that, which compiled code would read or write past their ends.
    """
    weights = QTYPES[qtype].unpacked_shape((packed.numel(),))[0]
    if packed.dtype is not torch.uint8 or out.numel() != weights or not out.is_contiguous():
        raise QuantError(
            f"{qtype}: {packed.numel()} x {packed.dtype} into {out.numel()} weights of strides {out.stride()},"
            f" expected torch.uint8 into {weights} contiguous weights"
        )
    if packed.is_meta:
        torch.ops.wanquant.dequantize_into(packed, qtype, out)
    elif packed.numel():
        path = _PATHS.get(packed.device.type)
        if not (path and path.dequantize(QTYPES[qtype], packed, out)):
            eager.dequantize(QTYPES[qtype], packed, out)


def _dequantize(packed: Tensor, qtype: str, dtype: torch.dtype) -> Tensor:
    out = _fake(packed, qtype, dtype)
    dequantize_into(packed, qtype, out)
    return out


def _fake(packed: Tensor, qtype: str, dtype: torch.dtype) -> Tensor:
    return packed.new_empty(QTYPES[qtype].unpacked_shape(tuple(packed.shape)), dtype=dtype)


def _register() -> torch.library.Library | None:
    """The operator lives as long as what this returns; a second copy of the pack in a process finds it in place."""
    if hasattr(torch.ops.wanquant, "dequantize"):
        return None
    # Not torch.library.custom_op: its wrappers import torch._dynamo at the first call, which takes seconds.
    library = torch.library.Library("wanquant", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define("dequantize(Tensor packed, str qtype, ScalarType dtype) -> Tensor")  # type: ignore[no-untyped-call]
    library.impl("dequantize", _dequantize, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    # Not register_fake, which looks for its caller in all loaded modules: a fifth of a second within ComfyUI.
    library.impl("dequantize", _fake, "Meta")  # type: ignore[no-untyped-call]
    # What a count of memory on meta tensors sees of a fused kernel: it allocates nothing.
    library.define("dequantize_into(Tensor packed, str qtype, Tensor(a!) out) -> ()")  # type: ignore[no-untyped-call]
    library.impl("dequantize_into", lambda packed, qtype, out: None, "Meta")  # type: ignore[no-untyped-call]
    return library


_library = _register()
