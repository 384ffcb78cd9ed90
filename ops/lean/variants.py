"""ComfyUI's Wan model classes, and which of them have blocks that run lean. Source: comfy/ldm/wan/, ComfyUI 0.33.0."""

from __future__ import annotations

from dataclasses import dataclass

import comfy.ldm.wan.model as wan


@dataclass(frozen=True)
class Variant:
    """What a model class allows."""

    lean_blocks: bool = True
    keeps_input: bool = False
    """The model reads the input of the first block again later, so that block must work on a copy."""


VARIANTS = {
    "WanModel": Variant(),
    "CameraWanModel": Variant(),
    "SCAILWanModel": Variant(),
    "SCAIL2WanModel": Variant(),
    "VaceWanModel": Variant(keeps_input=True),
    # What these run after some blocks stays ComfyUI's: the audio injector, the music injector, the face adapter.
    "WanModel_S2V": Variant(),
    "WanDancerModel": Variant(),
    "AnimateWanModel": Variant(),
    "HumoWanModel": Variant(),
    # ComfyUI does not pass a replaced block the pose branch that these blocks attend to.
    "WanAnimate2Model": Variant(lean_blocks=False),
    # Its blocks keep keys and values from one forward to the next.
    "CausalWanModel": Variant(lean_blocks=False),
}
"""What each of ComfyUI's classes allows, by its name."""

_UNKNOWN = Variant(keeps_input=True)


def variant(model: wan.WanModel) -> Variant:
    """Return what the class of `model` allows. In an unknown class, blocks of ComfyUI's plain class run lean."""
    return VARIANTS.get(type(model).__name__, _UNKNOWN)
