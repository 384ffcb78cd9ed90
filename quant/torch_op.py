"""`torch.ops.wanquant.dequantize(packed, qtype, dtype)`: an operator, so that torch.compile does not trace into it."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import QuantError
from .kernels import eager
from .kernels.optional import FUSED, GGML
from .qtype import QTYPES

# The device type of ROCm is cuda, too.
_PATHS = {"cuda": FUSED, "xpu": FUSED, "cpu": GGML}


def dequantize_into(packed: Tensor, qtype: str, out: Tensor) -> None:
    """Dequantize into an existing tensor.

    Args:
        packed: uint8, (..., n_blocks * type_size), of any strides.
        out: any float dtype, n_blocks * block_size elements, contiguous; written to.

    Raises:
        QuantError: a dtype, size, strides or device differs from that. Compiled code would access memory out of bounds.
    """
    n_elements = QTYPES[qtype].unpacked_shape((packed.numel(),))[0]
    if packed.device != out.device:
        raise QuantError(f"{qtype}: packed data on {packed.device}, output on {out.device}; put both on one device")
    if packed.dtype is not torch.uint8 or out.numel() != n_elements or not out.is_contiguous():
        raise QuantError(
            f"{qtype}: got {packed.numel()} elements of {packed.dtype} and an output of {out.numel()} elements with"
            f" strides {out.stride()}, expected torch.uint8 and {n_elements} contiguous elements; allocate a new output"
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
    """Register the operator, which lives as long as the result; a second copy of the pack uses that of the first."""
    if hasattr(torch.ops.wanquant, "dequantize"):
        return None
    # Not torch.library.custom_op, whose wrappers import torch._dynamo at the first call, which takes seconds.
    library = torch.library.Library("wanquant", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define("dequantize(Tensor packed, str qtype, ScalarType dtype) -> Tensor")  # type: ignore[no-untyped-call]
    library.impl("dequantize", _dequantize, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    # Not register_fake, which searches all loaded modules for its caller: 0.2 seconds within ComfyUI.
    library.impl("dequantize", _fake, "Meta")  # type: ignore[no-untyped-call]
    # On meta tensors, this operator stands for a fused kernel, so that counts of memory see that it allocates nothing.
    library.define("dequantize_into(Tensor packed, str qtype, Tensor(a!) out) -> ()")  # type: ignore[no-untyped-call]
    library.impl("dequantize_into", lambda packed, qtype, out: None, "Meta")  # type: ignore[no-untyped-call]
    return library


_library = _register()
