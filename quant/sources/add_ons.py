"""Add-ons: parts of a Wan transformer that are published as separate files (VACE, control, audio, identity).

Source: kijai/ComfyUI-WanVideoWrapper nodes_model_loading.py loadmodel @ 3317577;
comfy/ldm/wan/model.py, ComfyUI 0.30.0.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from ..errors import QuantError
from ..units import counted
from .layers import MARKER

_ADD_ON_NAME = re.compile(
    r"(vace_blocks|vace_patch_embedding|control_adapter|ref_conv|face_adapter|face_encoder|motion_encoder"
    r"|pose_patch_embedding|casual_audio_encoder|audio_injector|audio_proj|cond_encoder|trainable_cond_mask"
    r"|proj_model|blocks\.\d{1,9}\.(audio_cross_attn|norm_x|motion_attn|self_attn\.ref_adapter"
    r"|cross_attn\.(ip_adapter|k_proj|v_proj)))\..+"
)

_TALKING_REMEDY = (
    "ComfyUI takes it as a MODEL_PATCH: load a GGUF of it with Load Model Patch (GGUF), or its safetensors file in"
    " models/model_patches with ModelPatchLoader, and connect it to WanInfiniteTalkToVideo"
)
_OTHER_SOFTWARE = "it works in software that has these layers, such as ComfyUI-WanVideoWrapper"
_WITHOUT_LAYERS = (
    (
        re.compile(r"audio_proj\.(proj1|proj1_vf|proj2|proj3|norm)\..+|blocks\.\d{1,9}\.(audio_cross_attn|norm_x)\..+"),
        "InfiniteTalk or MultiTalk",
        _TALKING_REMEDY,
    ),
    (re.compile(r"proj_model\..+|blocks\.\d{1,9}\.cross_attn\.[kv]_proj\..+"), "FantasyTalking", _OTHER_SOFTWARE),
    (re.compile(r"blocks\.\d{1,9}\.(self_attn\.ref|cross_attn\.ip)_adapter\..+"), "Lynx", _OTHER_SOFTWARE),
    (re.compile(r"blocks\.\d{1,9}\.motion_attn\..+"), "MTV Crafter", _OTHER_SOFTWARE),
)
"""The tensors for which ComfyUI's Wan models have no layers, whose they are, and what takes them."""

# ComfyUI builds the model of one variant, and ignores the tensors of the others.
# Source: comfy/model_detection.py detect_unet_config, ComfyUI 0.30.0.
_VARIANTS = {
    "VACE": ("vace_blocks.", "vace_patch_embedding."),
    "camera control": ("control_adapter.",),
    "speech to video": ("casual_audio_encoder.", "audio_injector.", "cond_encoder.", "trainable_cond_mask."),
    "Animate": ("face_adapter.", "face_encoder.", "motion_encoder.", "pose_patch_embedding."),
}


class Shaped(Protocol):
    """A tensor, or what a header says about it."""

    @property
    def shape(self) -> tuple[int, ...]: ...


class _Source(Protocol):
    @property
    def path(self) -> Path: ...
    @property
    def tensors(self) -> Mapping[str, Shaped]: ...


def is_add_on(names: Collection[str], prefix: str) -> bool:
    """Return whether all tensor names, which start with `prefix`, belong to an add-on."""
    return len(names) > 0 and all(_is_of_add_on(name, prefix) for name in names)


def belongs_to_add_on(name: str) -> bool:
    """Return whether a tensor of this name, without prefix, is part of an add-on."""
    return _is_of_add_on(name, "")


def check_add_on(base: _Source, add_on: _Source) -> None:
    """Refuse an add-on that cannot be merged onto this transformer.

    Raises:
        QuantError: not an add-on, a tensor that both files have, or a block of another size than the transformer's.
    """
    if not is_add_on(add_on.tensors.keys(), ""):
        other = next(name for name in add_on.tensors if not _is_of_add_on(name, ""))
        raise QuantError(f"{add_on.path}: not an add-on (it has tensor {other}); choose the file of an add-on")
    for name, tensor in add_on.tensors.items():
        if name in base.tensors:
            raise QuantError(
                f"{add_on.path}: tensor {name}: is in {base.path.name} too, which has this add-on already;"
                " leave out the add-on"
            )
        twin = base.tensors.get(re.sub(r"^vace_blocks\.\d{1,9}\.", "blocks.0.", name))
        if twin is not None and twin.shape != tensor.shape:
            raise QuantError(
                f"{add_on.path}: tensor {name}: shape {tensor.shape}, expected {twin.shape} as in the blocks of"
                f" {base.path.name}; choose the add-on for this size of model"
            )


def check_has_layers(base: _Source, add_on: _Source) -> None:
    """Refuse an add-on that ComfyUI would ignore, wholly or in part, when it loads the merged model.

    Raises:
        QuantError: tensors for which ComfyUI has no layers, or an add-on for another variant than the base's.
    """
    useless = find_without_layers(add_on.tensors.keys())
    if useless is not None:
        raise QuantError(f"{add_on.path}: {useless}")
    variants = [variant for variant in _VARIANTS if _has_variant(variant, (*base.tensors, *add_on.tensors))]
    if len(variants) > 1:
        raise QuantError(
            f"{add_on.path}: {base.path.name} would have the layers of {' and '.join(variants)}, but ComfyUI builds a"
            " model with those of one only; choose one add-on"
        )


class WithoutLayers(NamedTuple):
    """Tensors for which ComfyUI's Wan models have no layers."""

    names: list[str]
    whose: str
    remedy: str

    def __str__(self) -> str:
        return (
            f"{counted(len(self.names), 'tensor')} of {self.whose} ({self.names[0]}, ...) would have no effect,"
            f" because ComfyUI's Wan models have no such layers; {self.remedy}"
        )


def find_without_layers(names: Collection[str]) -> WithoutLayers | None:
    """Return the tensors for which ComfyUI's Wan models have no layers, or None if there are none."""
    for pattern, whose, remedy in _WITHOUT_LAYERS:
        found = [name for name in names if pattern.fullmatch(name)]
        if found:
            return WithoutLayers(found, whose, remedy)
    return None


def part_of_add_on(name: str) -> str:
    """Return the part of an add-on that a tensor belongs to, with the same name in all blocks."""
    match = _ADD_ON_NAME.fullmatch(name)
    return re.sub(r"\d+", "*", match[1]) if match else name


def _has_variant(variant: str, names: Collection[str]) -> bool:
    return any(name.startswith(_VARIANTS[variant]) for name in names)


def _is_of_add_on(name: str, prefix: str) -> bool:
    bare = name.removeprefix(prefix)
    return bare == MARKER or (name.startswith(prefix) and _ADD_ON_NAME.fullmatch(bare) is not None)
