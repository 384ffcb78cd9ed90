"""GGUF blocks as the host's own QuantizedTensor, so that the host's memory manager moves them without knowing GGUF."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from comfy.quant_ops import QuantizedLayout, QuantizedTensor, register_layout_class
from torch import Tensor

from ...quant import QTYPES
from .. import host

LAYOUT_NAME = "WanQuantGGUF"
"""The registry is global to the process: another pack must not share the name."""


@dataclasses.dataclass(frozen=True)
class GGUFParams:
    """What the bytes alone do not say. No tensors: one byte buffer is all that moves between devices.

    The methods are the host's protocol. `clone` and `to_device` return new objects because the host writes through
    `copy_from` into the params of a copy, which must not reach the original.
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
    """Rows of ggml blocks: qdata is uint8 (rows, n_blocks * type_size), orig_shape the shape in weights.

    Source: comfy_kitchen/tensor/base.py QuantizedLayout, comfy-kitchen 0.2.26.
    """

    Params = GGUFParams

    @classmethod
    def dequantize(cls, qdata: Tensor, params: GGUFParams) -> Tensor:
        """`orig_dtype`, `orig_shape`: always a fresh tensor, since LoRAs are added to it in place."""
        return QTYPES[params.qtype].dequantize(qdata, params.orig_dtype).view(params.orig_shape)

    @classmethod
    def quantize(cls, tensor: Tensor, qtype: str = "Q8_0", **_: object) -> tuple[Tensor, GGUFParams]:
        """Round to nearest, for host paths that write a packed weight back; nothing in this pack does.

        Args:
            tensor: floating point, (..., n).
            _: the host's rounding options, which block formats do not have.
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
    """Wrap block bytes, without a copy, as a tensor that the host sees as `shape` weights of `dtype`."""
    return QuantizedTensor(qdata, LAYOUT_NAME, GGUFParams(qtype, dtype, shape))


def is_packed(tensor: object) -> bool:
    return isinstance(tensor, QuantizedTensor) and host.layout_name(tensor) == LAYOUT_NAME


def with_dtype(tensor: QuantizedTensor, dtype: torch.dtype) -> QuantizedTensor:
    """The same bytes, to be decoded to `dtype`; the tensor's own `.to(dtype)` would copy them."""
    return pack(host.packed_bytes(tensor), tensor.params.qtype, tensor.params.orig_shape, dtype)


def dense(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Decode a packed tensor to `dtype` in one step; any other tensor is returned as it is."""
    return with_dtype(tensor, dtype).dequantize() if is_packed(tensor) else tensor
