"""GGUF blocks as a `QuantizedTensor` of the host, whose memory manager moves them without knowing GGUF."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from comfy.quant_ops import QuantizedLayout, QuantizedTensor, register_layout_class
from torch import Tensor

from ...quant import QTYPES
from .. import host

LAYOUT_NAME = "WanQuantGGUF"
"""The key in the host's registry of layouts, which all packs of a process share."""


@dataclasses.dataclass(frozen=True)
class GGUFParams:
    """The ggml type, dtype and shape of a packed tensor, which its bytes do not tell.

    The host's protocol prescribes the methods. `clone` and `to_device` return new objects: the host calls `copy_from`
    on the parameters of a copy, and the original must not change. There are no tensors here, so that only the bytes
    move between devices.
    """

    qtype: str
    orig_dtype: torch.dtype
    orig_shape: tuple[int, ...]

    def _tensor_fields(self) -> list[str]:
        return []

    def to_device(self, device: torch.device) -> GGUFParams:
        return dataclasses.replace(self)

    def clone(self) -> GGUFParams:
        return dataclasses.replace(self)

    def copy_from(self, src: GGUFParams, non_blocking: bool = False) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, getattr(src, field.name))


class GGUFLayout(QuantizedLayout):
    """Rows of ggml blocks: `qdata` is uint8, (rows, n_blocks * type_size); `orig_shape` counts elements.

    Source: comfy_kitchen/tensor/base.py QuantizedLayout, comfy-kitchen 0.2.26.
    """

    Params = GGUFParams

    @classmethod
    def dequantize(cls, qdata: Tensor, params: GGUFParams) -> Tensor:
        """Return a new tensor of `orig_dtype` and `orig_shape`, which the caller may write to.

        Args:
            qdata: uint8, (rows, n_blocks * type_size).
        """
        return QTYPES[params.qtype].dequantize(qdata, params.orig_dtype).view(params.orig_shape)

    @classmethod
    def quantize(cls, tensor: Tensor, qtype: str = "Q8_0", **_: object) -> tuple[Tensor, GGUFParams]:
        """Quantize with round to nearest, for code of the host that writes a packed weight back.

        Args:
            tensor: floating point, (..., n).
            qtype: name of the ggml type.
            _: the host's rounding options, which block formats do not have.

        Returns:
            Blocks, uint8, (rows, n_blocks * type_size), and their parameters.
        """
        params = GGUFParams(qtype, tensor.dtype, tuple(tensor.shape))
        return QTYPES[qtype].quantize(tensor, effort="fast"), params

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        return {"qtype": qtensor.params.qtype}

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[Tensor, ...]:
        return (host.packed_bytes(qtensor),)

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: GGUFParams) -> dict[str, Tensor]:
        return {"": qdata}


register_layout_class(LAYOUT_NAME, GGUFLayout)


def pack(qdata: Tensor, qtype: str, shape: tuple[int, ...], dtype: torch.dtype) -> QuantizedTensor:
    """Wrap blocks, without a copy, as a tensor of shape `shape` that dequantizes to `dtype`.

    Args:
        qdata: uint8, (rows, n_blocks * type_size).
    """
    return QuantizedTensor(qdata, LAYOUT_NAME, GGUFParams(qtype, dtype, shape))


def is_packed(tensor: object) -> bool:
    """Return whether `tensor` holds GGUF blocks of this layout."""
    return isinstance(tensor, QuantizedTensor) and host.layout_name(tensor) == LAYOUT_NAME


def with_dtype(tensor: QuantizedTensor, dtype: torch.dtype) -> QuantizedTensor:
    """Return a packed tensor on the same bytes that dequantizes to `dtype`; its own `.to(dtype)` would copy them."""
    return pack(host.packed_bytes(tensor), tensor.params.qtype, tensor.params.orig_shape, dtype)


def dense(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantize a packed tensor to `dtype`, of the same shape; return any other tensor unchanged."""
    return with_dtype(tensor, dtype).dequantize() if is_packed(tensor) else tensor
