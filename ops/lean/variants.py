"""ComfyUI's Wan model classes, and how much of each runs lean. Source: comfy/ldm/wan/, ComfyUI 0.30.0 and 0.33.0.

docs/memory.md has this table too.
"""

from __future__ import annotations

from dataclasses import dataclass

import comfy.ldm.wan.model as wan


@dataclass(frozen=True)
class Variant:
    """What a model class allows."""

    models: str
    """The models of the class, by the names that users know."""
    stock: str = ""
    """What runs as in ComfyUI before lean blocks or instead of them. It counts in predictions."""
    lean_blocks: bool = True
    keeps_input: bool = False
    """The model reads the input of the first block again later, so that block must work on a copy."""

    @property
    def level(self) -> str:
        """How much runs in pieces, in one word: partly means the blocks, but not all of what comes before them."""
        if not self.lean_blocks:
            return "stock"
        return "partly" if self.stock else "lean"


VARIANTS = {
    "WanModel": Variant("Wan 2.1 and 2.2 T2V, I2V, FLF2V, TI2V 5B, Fun Control, FlowRVS, Bernini"),
    "VaceWanModel": Variant("VACE", keeps_input=True),
    "CameraWanModel": Variant("Fun Camera", "the rays of the camera"),
    "SCAILWanModel": Variant("SCAIL"),
    "SCAIL2WanModel": Variant("SCAIL-2"),
    "HumoWanModel": Variant("HuMo", "the projection of the sound"),
    "WanModel_S2V": Variant("S2V", "the encoders of sound, motion and control video"),
    "WanDancerModel": Variant("WanDancer", "the encoder of the music"),
    "AnimateWanModel": Variant("Animate", "the encoders of faces and poses"),
    "WanAnimate2Model": Variant("Animate 2", "what it keeps of the poses for each block"),
    # The blocks keep keys and values of all frames. With a few frames at a time, these need the most memory.
    "CausalWanModel": Variant("Causal Forcing, Self Forcing", "all blocks, and what they keep", lean_blocks=False),
}
"""What each of ComfyUI's classes allows, by its name."""

_UNKNOWN = Variant("unknown", "blocks of classes of their own", keeps_input=True)


def variant(model: wan.WanModel) -> Variant:
    """Return what the class of `model` allows. In an unknown class, blocks of ComfyUI's plain class run lean."""
    return VARIANTS.get(type(model).__name__, _UNKNOWN)
