"""Add-ons: parts of a Wan transformer that are published as separate files (VACE, control, audio, identity).

Source: kijai/ComfyUI-WanVideoWrapper nodes_model_loading.py loadmodel @ 3317577;
comfy/ldm/wan/model.py, ComfyUI 0.30.0.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

from ..errors import QuantError
from .layers import MARKER

_ADD_ON_NAME = re.compile(
    r"(vace_blocks|vace_patch_embedding|control_adapter|ref_conv|face_adapter|face_encoder|motion_encoder"
    r"|pose_patch_embedding|casual_audio_encoder|audio_injector|audio_proj|cond_encoder|trainable_cond_mask"
    r"|proj_model|blocks\.\d+\.(audio_cross_attn|norm_x|motion_attn|self_attn\.ref_adapter"
    r"|cross_attn\.(ip_adapter|k_proj|v_proj)))\..+"
)


class _Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


class _Source(Protocol):
    @property
    def path(self) -> Path: ...
    @property
    def tensors(self) -> Mapping[str, _Shaped]: ...


def is_add_on(names: Collection[str], prefix: str) -> bool:
    """Return whether all tensor names, which start with `prefix`, belong to an add-on."""
    return len(names) > 0 and all(_is_of_add_on(name, prefix) for name in names)


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
        twin = base.tensors.get(re.sub(r"^vace_blocks\.\d+\.", "blocks.0.", name))
        if twin is not None and twin.shape != tensor.shape:
            raise QuantError(
                f"{add_on.path}: tensor {name}: shape {tensor.shape}, expected {twin.shape} as in the blocks of"
                f" {base.path.name}; choose the add-on for this size of model"
            )


def _is_of_add_on(name: str, prefix: str) -> bool:
    bare = name.removeprefix(prefix)
    return bare == MARKER or (name.startswith(prefix) and _ADD_ON_NAME.fullmatch(bare) is not None)
