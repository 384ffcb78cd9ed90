"""A Wan model on meta tensors: ComfyUI's own modules and packed weights, with shapes and dtypes but without data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.model_detection
import torch
from comfy.model_base import BaseModel
from torch import Tensor

from ...quant.gguf.header import TensorRecord
from ...quant.native.native_format import MARKER
from ...quant.qtype import QuantType
from .. import host
from ..loading.diffusion_model import host_tensor
from ..packed.layout import is_packed, pack
from ..packed.linear import GGUFOps

META = torch.device("meta")
_BLOCK = re.compile(r"^(vace_)?blocks\.(\d{1,9})\.")
_ONE_BLOCK = {"num_layers": 1}
_SHORTENED = {
    "WanModel": _ONE_BLOCK,
    "CameraWanModel": _ONE_BLOCK,
    "HumoWanModel": _ONE_BLOCK,
    "SCAILWanModel": _ONE_BLOCK,
    "SCAIL2WanModel": _ONE_BLOCK,
    "WanModel_S2V": _ONE_BLOCK,
    "WanDancerModel": _ONE_BLOCK,
    "AnimateWanModel": {"num_layers": 5},  # the face adapter runs after every fifth block
    "WanAnimate2Model": {"num_layers": 2},  # what a block keeps of the poses lives until the next one has its own
    "VaceWanModel": {"num_layers": 1, "vace_layers": 1},
}
"""The fewest blocks with the peak of the complete model, by the name of ComfyUI's class."""


def meta_model(
    shapes: Mapping[str, tuple[int, ...]],
    types: Mapping[str, QuantType],
    dtype: torch.dtype = torch.bfloat16,
    operations: type[GGUFOps] = GGUFOps,
    metadata: Mapping[str, str] | None = None,
) -> BaseModel:
    """Return the model that ComfyUI would detect and load from a GGUF with these tensors.

    Args:
        shapes: by tensor name without prefix, in torch's order of dimensions.
        types: by tensor name without prefix.
        dtype: that the model computes in.
        operations: the layers, which decide how products are computed.
        metadata: of the file, as the host names it.
    """
    state = {name: meta_packed(name, shape, types[name], dtype) for name, shape in shapes.items()}
    config = comfy.model_detection.model_config_from_unet(state, "", metadata=metadata)
    config.set_inference_dtype(dtype, dtype)
    config.custom_operations = operations
    return _build(config, state)


def meta_twin(model: BaseModel) -> BaseModel:
    """Return a copy of a loaded model on meta tensors.

    It keeps only as many of several equal blocks as the peak depends on.
    """
    source, loaded = model.diffusion_model, model.model_config
    shortened = _SHORTENED.get(type(source).__name__, {})
    config = type(loaded)(loaded.unet_config | shortened)
    config.set_inference_dtype(loaded.unet_config["dtype"], host.compute_dtype(model))
    config.custom_operations, config.quant_config = loaded.custom_operations, loaded.quant_config
    kept = {name: tensor for name, tensor in source.state_dict(keep_vars=True).items() if _is_kept(name, shortened)}
    return _build(config, {name: tensor if _is_read(name) else _as_meta(tensor) for name, tensor in kept.items()})


def _build(config: comfy.supported_models_base.BASE, state: dict[str, Tensor]) -> BaseModel:
    model: BaseModel = config.get_model(state, "", META)
    model.diffusion_model.load_state_dict(state, strict=False, assign=True)
    model.device = META
    return model.requires_grad_(False)


def _is_read(name: str) -> bool:
    """Return whether the host reads the values of a tensor while it loads: an attention preference or a marker."""
    return host.is_preference(name) or name.endswith(f".{MARKER}")


def _is_kept(name: str, shortened: Mapping[str, int]) -> bool:
    block = _BLOCK.match(name)
    return not (shortened and block) or int(block[2]) < shortened["vace_layers" if block[1] else "num_layers"]


def meta_packed(name: str, shape: tuple[int, ...], qtype: QuantType, dtype: torch.dtype) -> Tensor:
    """Return a meta tensor as it would be loaded from a GGUF: packed and of type `qtype`, or plain.

    Args:
        shape: in torch's order of dimensions.
        dtype: that the model computes in.
    """
    data = torch.empty(qtype.packed_shape(shape), dtype=torch.uint8, device=META)
    return host_tensor(TensorRecord(name, qtype, shape, shape, Path(), 0, data.nbytes), data, dtype)


def _as_meta(tensor: Tensor) -> Tensor:
    if is_packed(tensor):
        packed: Any = tensor
        data, params = _as_meta(host.packed_bytes(packed)), packed.params
        copied: Tensor = pack(data, params.qtype, params.orig_shape, packed.dtype)
        return copied
    return torch.empty_like(tensor, device=META)
