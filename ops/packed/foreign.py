"""Weights of other packs, whose data is not what their shape and dtype claim, as tensors that this pack understands.

ComfyUI-GGUF, its forks and calcuis' gguf keep a GGUF tensor as a `torch.Tensor` subclass: the data is uint8, `shape` is
that of the weight, and an attribute names the ggml type. Diffusers' GGUF parameter has the shape of its bytes instead.

Source: city96/ComfyUI-GGUF ops.py GGMLTensor @ 795e451; calcuis/gguf pig.py GGMLTensor @ 452dfed;
huggingface/diffusers quantizers/gguf/utils.py GGUFParameter @ 58eb52c.
"""

from __future__ import annotations

from enum import Enum
from math import prod

import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor

from ...quant import QTYPES, QuantError
from .layout import pack

_PLAIN_CLASSES = (Tensor, torch.nn.Parameter)
_PLAIN_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LINEAR_TENSORS = {"weight", "bias"}


def understood(module: torch.nn.Module, name: str, weight: Tensor) -> Tensor:
    """Return a weight as a tensor whose shape and dtype are true, without a copy where possible.

    Blocks of a known ggml type become a packed tensor of this pack. A tensor of a class with its own `dequantize` is
    dequantized.

    Args:
        module: the module that the weight belongs to.
        name: the name of the weight in the model; its last part is the attribute of `module`.
        weight: the parameter, of any class, shape and dtype.

    Raises:
        QuantError: the values of the weight are unknown.
    """
    shape = _true_shape(module, name.rpartition(".")[2], weight)
    if isinstance(weight, QuantizedTensor):
        found: Tensor | None = weight
    elif is_foreign(weight):
        readings = (read(weight, shape) for read in (_from_declared_type, _from_own_method, _plain))
        found = next((reading for reading in readings if reading is not None), None)
    else:
        found = None if _has_scales(module, weight) else weight
    if found is None or tuple(found.shape) != shape or not found.is_floating_point():
        raise QuantError(_refusal(name, weight, shape))
    return found


def is_foreign(weight: Tensor) -> bool:
    """Return whether a tensor of any shape and dtype is of a class that neither torch nor the host defines."""
    return type(weight) not in _PLAIN_CLASSES and not isinstance(weight, QuantizedTensor)


def foreign_class(model: torch.nn.Module) -> str | None:
    """Return the class of the first weight of another pack in a model, or None if there is none."""
    return next((_class_name(weight) for weight in model.parameters() if is_foreign(weight)), None)


def _true_shape(module: torch.nn.Module, attribute: str, weight: Tensor) -> tuple[int, ...]:
    rows, columns = (getattr(module, size, None) for size in ("out_features", "in_features"))
    if attribute == "weight" and isinstance(rows, int) and isinstance(columns, int):
        return rows, columns
    return tuple(weight.shape)


def _from_declared_type(weight: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    qtype = QTYPES.get(_declared_type(weight) or "")
    data = _data(weight)
    if qtype is None or data is None or not shape or shape[-1] % qtype.block_size:
        return None
    if data.nbytes != prod(qtype.packed_shape(shape)):
        return None
    plain = _PLAIN_TYPES.get(qtype.name)
    if plain is not None:
        return data.view(plain).view(shape) if data.dtype in (plain, torch.uint8) else None
    packed: Tensor = pack(data.view(torch.uint8).view(prod(shape[:-1]), -1), qtype.name, shape, torch.float32)
    return packed if data.itemsize == 1 else None


def _declared_type(weight: Tensor) -> str | None:
    """Return ggml's name of the type that an attribute of a foreign tensor gives, as an enumeration or a name."""
    given = (value for key, value in vars(weight).items() if "type" in key)
    names = (value.name if isinstance(value, Enum) else value for value in given)
    return next((name for name in names if isinstance(name, str)), None)


def _from_own_method(weight: Tensor, _: tuple[int, ...]) -> Tensor | None:
    dequantize = type(weight).dequantize
    if dequantize is Tensor.dequantize:
        return None
    try:
        values = dequantize(weight)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return None
    return values if isinstance(values, Tensor) and not is_foreign(values) else None


def _plain(weight: Tensor, _: tuple[int, ...]) -> Tensor | None:
    """Return a foreign tensor that holds plain numbers without its class, or None if it holds something else."""
    data = _data(weight)
    return data if data is not None and data.is_floating_point() and data.itemsize > 1 else None


def _data(weight: Tensor) -> Tensor | None:
    """Return what a foreign tensor stores, without a copy, or None if it wraps other tensors and stores nothing."""
    if type(weight).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return None
    return weight.as_subclass(Tensor).detach().contiguous()


def _has_scales(module: torch.nn.Module, weight: Tensor) -> bool:
    """Return whether a weight of one byte per element belongs to a module with more tensors, such as its scale."""
    own = {name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))}
    return weight.itemsize == 1 and not own <= _LINEAR_TENSORS


def _class_name(weight: Tensor) -> str:
    # The host imports a pack under the path of its folder.
    module = type(weight).__module__.replace("\\", "/").rpartition("/")[2]
    return f"{module}.{type(weight).__qualname__}"


def _refusal(name: str, weight: Tensor, shape: tuple[int, ...]) -> str:
    declared = _declared_type(weight) if is_foreign(weight) else None
    of_type = f" of type {declared}" if declared else ""
    return (
        f"MODEL: tensor {name}: a {_class_name(weight)}{of_type} with {weight.dtype} data is not understood as values"
        f" of shape {shape}; load the file with a node of ComfyUI, or a GGUF with Load Diffusion Model (Quantized)"
    )
