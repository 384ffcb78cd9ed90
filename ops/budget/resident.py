"""What stays on the accelerator while a model is sampled within a budget, and what leaves it for that."""

from __future__ import annotations

import comfy.model_management
from comfy.model_patcher import ModelPatcher

from .. import host
from ..packed.patcher import PackedPatcher


def unload_other_models(model: ModelPatcher, nbytes: float = 1e30) -> None:
    """Unload other models from the accelerator until `nbytes` are free there, by default all of them.

    With dynamic VRAM, ComfyUI would leave them there until an allocation needs their memory.
    """
    loaded = comfy.model_management.current_loaded_models
    own = [entry for entry in loaded if entry.model is not None and entry.model.is_clone(model)]
    comfy.model_management.free_memory(nbytes, model.load_device, keep_loaded=own)


def keep_weights(model: ModelPatcher, room: int) -> None:
    """Let up to `room` bytes of weights stay on the accelerator, after all of them were offloaded."""
    if not model.is_dynamic():
        model.partially_load(model.load_device, room)
        return
    factor_bytes = keep_factors(model, room)
    host.limit_resident(model.model, model.load_device, room - factor_bytes)


def keep_factors(model: ModelPatcher, room: int) -> int:
    """Keep up to `room` bytes of LoRA factors on the accelerator, with dynamic VRAM only, and return their bytes.

    LoRA factors come before weights, because only weights are read ahead of their use. In the legacy memory mode the
    patcher itself moves factors, after the weights.
    """
    if not (model.is_dynamic() and isinstance(model, PackedPatcher)):
        return 0
    return model.keep_factors_on_device(model.load_device, room)
