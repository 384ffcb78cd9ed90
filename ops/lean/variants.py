"""Which of the host's Wan models run lean, and what of them does not. Source: comfy/ldm/wan/, ComfyUI 0.33.0."""

from __future__ import annotations

from dataclasses import dataclass

import comfy.ldm.wan.model as wan


@dataclass(frozen=True)
class Variant:
    """What to expect of a model class."""

    blocks: bool = True
    """The blocks run lean."""
    stock: str = ""
    """What runs as in the host, with its memory, after some blocks."""
    keeps_input: bool = False
    """The model reads the first block's input again later, so that block works on a copy."""


VARIANTS = {
    "WanModel": Variant(),
    "CameraWanModel": Variant(),
    "SCAILWanModel": Variant(),
    "SCAIL2WanModel": Variant(),
    "VaceWanModel": Variant(keeps_input=True),
    "WanModel_S2V": Variant(stock="the audio injector"),
    "WanDancerModel": Variant(stock="the music injector"),
    "AnimateWanModel": Variant(stock="the face adapter"),
    "WanAnimate2Model": Variant(
        blocks=False, stock="all: its blocks attend to a pose branch, which a block's replacement is not given"
    ),
    "HumoWanModel": Variant(
        blocks=False, stock="all: its blocks attend to audio, which a block's replacement is not given"
    ),
    "CausalWanModel": Variant(blocks=False, stock="all: blocks keep keys and values between forwards"),
}
"""By the name of the class."""

_UNKNOWN = Variant(keeps_input=True)


def variant(model: wan.WanModel) -> Variant:
    """Of a class that is not in the table, whichever blocks are the host's plain ones run lean."""
    return VARIANTS.get(type(model).__name__, _UNKNOWN)
