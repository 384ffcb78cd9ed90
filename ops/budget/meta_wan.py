"""A Wan model on meta tensors: the host's own modules and our packed weights in their true shapes, without a byte."""

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
from ...quant.qtype import QuantType
from .. import host
from ..loading.diffusion_model import host_tensor
from ..packed.layout import is_packed, pack
from ..packed.linear import GGUFOps

META = torch.device("meta")
_BLOCK = re.compile(r"^(vace_)?blocks\.(\d+)\.")
# Of models whose blocks are all alike one block stands for all. Animate has another layer after every fifth.
_ALIKE = ["WanModel", "CameraWanModel", "HumoWanModel", "SCAILWanModel", "SCAIL2WanModel"]
_ALIKE += ["WanModel_S2V", "WanDancerModel"]
_SHORTENED = {name: {"num_layers": 1} for name in _ALIKE} | {
    "AnimateWanModel": {"num_layers": 5},
    "WanAnimate2Model": {"num_layers": 1},
    "VaceWanModel": {"num_layers": 1, "vace_layers": 1},
}


def meta_model(
    shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, QuantType], dtype: torch.dtype = torch.bfloat16
) -> BaseModel:
    """The model that a GGUF with these tensors would load as, found by the host's own detection.

    Args:
        shapes: by the tensor's name without prefix, in torch's order.
        dtype: of the arithmetic.
    """
    state = {name: meta_packed(name, shape, types[name], dtype) for name, shape in shapes.items()}
    config = comfy.model_detection.model_config_from_unet(state, "")
    config.set_inference_dtype(dtype, dtype)
    config.custom_operations = GGUFOps
    return _build(config, state)


def meta_twin(model: BaseModel) -> BaseModel:
    """A copy on meta tensors, of whose equal blocks only one is there, which takes as much as each of them."""
    source, loaded = model.diffusion_model, model.model_config
    fewer = _SHORTENED.get(type(source).__name__, {})
    config = type(loaded)(loaded.unet_config | fewer)
    config.set_inference_dtype(loaded.unet_config["dtype"], host.compute_dtype(model))
    config.custom_operations, config.quant_config = loaded.custom_operations, loaded.quant_config
    kept = {name: tensor for name, tensor in source.state_dict(keep_vars=True).items() if _kept(name, fewer)}
    return _build(config, {n: tensor if host.is_preference(n) else _as_meta(tensor) for n, tensor in kept.items()})


def _build(config: comfy.supported_models_base.BASE, state: dict[str, Tensor]) -> BaseModel:
    model: BaseModel = config.get_model(state, "", META)
    model.diffusion_model.load_state_dict(state, strict=False, assign=True)
    model.device = META
    return model.requires_grad_(False)


def _kept(name: str, fewer: Mapping[str, int]) -> bool:
    block = _BLOCK.match(name)
    return not (fewer and block) or int(block[2]) < fewer["vace_layers" if block[1] else "num_layers"]


def meta_packed(name: str, shape: tuple[int, ...], qtype: QuantType, dtype: torch.dtype) -> Tensor:
    """A tensor as it would be loaded from a GGUF."""
    data = torch.empty(qtype.packed_shape(shape), dtype=torch.uint8, device=META)
    return host_tensor(TensorRecord(name, qtype, shape, shape, Path(), 0, data.nbytes), data, dtype)


def _as_meta(tensor: Tensor) -> Tensor:
    if is_packed(tensor):
        packed: Any = tensor
        data, params = _as_meta(host.packed_bytes(packed)), packed.params
        copied: Tensor = pack(data, params.qtype, params.orig_shape, packed.dtype)
        return copied
    return torch.empty_like(tensor, device=META)
