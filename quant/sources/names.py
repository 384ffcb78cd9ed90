"""What a file holds, told by its tensor names, and the names that its tensors get.

Source: comfy/ldm/wan/model.py, ComfyUI 0.30.0, whose names are those of github.com/Wan-Video.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from ..errors import QuantError
from . import diffusers, t5
from .add_ons import is_add_on

PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "model.model.", "net.", "transformer.", "model.")

WAN_KEY = "head.modulation"
"""The name of a tensor that every Wan transformer has and an add-on has not, without prefix."""
WAN, T5 = "wan", "t5encoder"
"""Values of `general.architecture`."""

_LOOKS_LIKE = (
    (("lora_A.", "lora_B.", "lora_down.", "lora_up."), "a LoRA"),
    (("encoder.block.", "encoder.layers.", "text_model."), "a text encoder"),
    (("vision_model.", "visual."), "a vision encoder"),
    (("decoder.head.", "decoder.conv_in.", "decoder.up."), "a VAE"),
    (("double_blocks.",), "a Flux or Hunyuan model"),
    (("input_blocks.", "joint_blocks."), "a Stable Diffusion model"),
    (("transformer_blocks.",), "another diffusion transformer"),
)


class Naming(NamedTuple):
    """How the tensors of a file are named."""

    prefix: str
    rename: Callable[[str], str | None]
    """From the name without prefix to that in the GGUF; None for what stays behind."""
    architecture: str = WAN


def find_naming(path: Path, names: Collection[str]) -> Naming:
    """The naming of a Wan transformer, of an add-on for one, or of a T5 text encoder.

    Raises:
        QuantError: anything else, with what it looks like.
    """
    for key, rename in ((WAN_KEY, str), (diffusers.KEY, diffusers.renaming(path))):
        for prefix in PREFIXES:
            if prefix + key in names:
                return Naming(prefix, rename)
    for key, rename in t5.NAMINGS.items():
        if key in names:
            return Naming("", rename, T5)
    for prefix in PREFIXES:
        if is_add_on(names, prefix):
            return Naming(prefix, str)
    looks = next((what for keys, what in _LOOKS_LIKE if any(key in n for n in names for key in keys)), "something else")
    raise QuantError(
        f"{path}: not a Wan model (no tensor {WAN_KEY}): it looks like {looks};"
        " only Wan and its text encoder are supported"
    )
