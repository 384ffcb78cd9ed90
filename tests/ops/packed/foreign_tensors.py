"""Stand-ins for the tensors of other packs, written from the description of how these behave."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import torch

from wanquant.quant import QTYPES
from wanquant.quant.gguf.reader import open_gguf

GGMLQuantizationType = IntEnum("GGMLQuantizationType", {q.name: q.ggml_type for q in QTYPES.values()} | {"Q9_X": 99})


class StandInGGMLTensor(torch.Tensor):
    """Stored bytes that claim the shape of the weight, as in ComfyUI-GGUF and its forks."""

    def __new__(cls, data: torch.Tensor, **_: Any) -> StandInGGMLTensor:
        return super().__new__(cls, data)

    def __init__(self, data: torch.Tensor, *, tensor_type: Any, tensor_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.tensor_type, self.tensor_shape = tensor_type, torch.Size(tensor_shape)

    def detach(self) -> StandInGGMLTensor:
        return self

    def clone(self, *_: Any, **__: Any) -> StandInGGMLTensor:
        return self

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.tensor_shape


class StandInGGUFParameter(torch.nn.Parameter):
    """Stored bytes that have the shape of the bytes, as in Diffusers."""

    def __new__(cls, data: torch.Tensor, quant_type: Any) -> StandInGGUFParameter:
        parameter = torch.Tensor._make_subclass(cls, data, False)
        parameter.quant_type = quant_type
        return parameter


class StandInScaled(torch.Tensor):
    """Integers and a scale inside a tensor without storage, as in torchao."""

    def __new__(cls, codes: torch.Tensor, scale: float) -> StandInScaled:
        made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.bfloat16)
        made.codes, made.scale = codes, scale
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(func)

    def dequantize(self) -> torch.Tensor:
        return self.codes.float() * self.scale


class StandInParams4bit(torch.nn.Parameter):
    """Packed nibbles without a type that can be looked up, as in bitsandbytes."""

    def __new__(cls, data: torch.Tensor) -> StandInParams4bit:
        return torch.Tensor._make_subclass(cls, data, False)


def with_foreign_weights(patcher: Any, gguf: Any, make: Any = StandInGGMLTensor) -> Any:
    """Give the Linears of a loaded dense MODEL the tensors of a GGUF of that model, as another pack's loader does."""
    model = patcher.model.diffusion_model
    for name, tensor in open_gguf(gguf).tensors.items():
        module_name, _, attribute = name.rpartition(".")
        module = model.get_submodule(module_name)
        if hasattr(module, "in_features"):
            data, ggml_type = tensor.data, GGMLQuantizationType[tensor.qtype.name]
            if tensor.qtype.name in ("F32", "F16"):
                data = data.view(getattr(torch, {"F32": "float32", "F16": "float16"}[tensor.qtype.name]))
            foreign = make(data.view(data.shape), tensor_type=ggml_type, tensor_shape=tensor.shape)
            setattr(module, attribute, torch.nn.Parameter(foreign, requires_grad=False))
    return patcher
