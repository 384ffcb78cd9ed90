"""Dequantization, and rows of 8-bit integers, by the fastest path of the device.

`torch.ops.wanquant.dequantize(packed, qtype, dtype)` is an operator, so that torch.compile does not trace into it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import QuantError
from .kernels import eager
from .kernels.optional import FUSED, FUSED_INT8, GGML
from .native.rotation import GROUP
from .qtype import QTYPES

# The device type of ROCm is cuda, too.
_PATHS = {"cuda": FUSED, "xpu": FUSED, "cpu": GGML}
_INT8_PATHS = {"cuda": FUSED_INT8, "xpu": FUSED_INT8}


def dequantize_into(packed: Tensor, qtype: str, out: Tensor) -> str:
    """Dequantize into an existing tensor, and return the name of the library whose code did it.

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
        if path and path.dequantize(QTYPES[qtype], packed, out):
            return path.library
        eager.dequantize(QTYPES[qtype], packed, out)
    return "torch"


def int8_rows_into(packed: Tensor, qtype: str, codes: Tensor, scales: Tensor, delta: Tensor | None = None) -> None:
    """Dequantize rows to float32, rotate them, add `delta`, and round them to 8-bit integers with one scale a row.

    The bits are those of `eager.int8_rows` on every device.

    Args:
        packed: uint8, (n_rows, n_blocks * type_size), of any strides.
        qtype: name of a ggml type; F32, F16 and BF16 are for the bytes of dense rows.
        codes: int8, (n_rows, columns), contiguous, with columns that are a multiple of 256; written to.
        scales: float32, (n_rows, 1), contiguous; written to.
        delta: what to add to the rotated rows, of any float dtype, like `codes`, contiguous.

    Raises:
        QuantError: a dtype, shape, strides or device differs from that.
    """
    rows, columns = QTYPES[qtype].unpacked_shape((len(packed), packed[:1].numel()))
    devices = {tensor.device for tensor in (packed, codes, scales, delta) if tensor is not None}
    if len(devices) > 1:
        raise QuantError(f"{qtype}: packed data, codes and scales on {devices}; put all of them on one device")
    if delta is not None and not (delta.shape == codes.shape and delta.is_contiguous() and delta.is_floating_point()):
        raise QuantError(
            f"{qtype}: got {delta.dtype} of shape {tuple(delta.shape)} to add, expected floating point of shape"
            f" {tuple(codes.shape)}, contiguous; allocate a new tensor"
        )
    expected = (rows, columns), torch.int8, (rows, 1), torch.float32, torch.uint8, True, True, 0
    got = tuple(codes.shape), codes.dtype, tuple(scales.shape), scales.dtype, packed.dtype
    if (*got, codes.is_contiguous(), scales.is_contiguous(), columns % GROUP) != expected:
        raise QuantError(
            f"{qtype}: got codes, scales and packed data {got}, expected {expected[:5]}, contiguous and with a multiple"
            f" of {GROUP} columns; allocate new outputs"
        )
    if packed.is_meta:
        torch.ops.wanquant.int8_rows_into(packed, qtype, codes, scales, delta)
    elif packed.numel():
        path = _INT8_PATHS.get(packed.device.type)
        if not (path and path.int8_rows(QTYPES[qtype], packed, codes, scales, delta)):
            eager.int8_rows(QTYPES[qtype], packed, codes, scales, delta)


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
    # On meta tensors, these operators stand for fused kernels, so that counts of memory see that they allocate nothing.
    library.define("dequantize_into(Tensor packed, str qtype, Tensor(a!) out) -> ()")  # type: ignore[no-untyped-call]
    library.impl("dequantize_into", lambda packed, qtype, out: None, "Meta")  # type: ignore[no-untyped-call]
    library.define(  # type: ignore[no-untyped-call]
        "int8_rows_into(Tensor packed, str qtype, Tensor(a!) codes, Tensor(b!) scales, Tensor? delta=None) -> ()"
    )
    library.impl("int8_rows_into", lambda *_: None, "Meta")  # type: ignore[no-untyped-call]
    return library


_library = _register()
