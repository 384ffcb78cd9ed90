"""Detection of the model in a file by its tensor names, and the renaming of its tensors.

Source: comfy/ldm/wan/model.py, ComfyUI 0.30.0, which uses the names of github.com/Wan-Video.
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
"""The name, without prefix, of a tensor that every Wan transformer has and that add-ons do not have."""
WAN, T5 = "wan", "t5encoder"
"""Values of the GGUF key `general.architecture`."""

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
    """The naming of the tensors in a file."""

    prefix: str
    rename: Callable[[str], str | None]
    """The function from a name without prefix to the name in the GGUF, or to None if the tensor is left out."""
    architecture: str = WAN


def find_naming(path: Path, names: Collection[str]) -> Naming:
    """Return the naming of a Wan transformer, of an add-on for one, or of a T5 text encoder.

    Args:
        path: the path of the file, for messages.
        names: the names of its tensors.

    Raises:
        QuantError: another model; the message says what it looks like.
    """
    for key, rename in ((WAN_KEY, str), (diffusers.KEY, diffusers.renaming(path))):
        for prefix in PREFIXES:
            if prefix + key in names:
                return Naming(prefix, rename)
    if (encoder := t5.find_encoder(names)) is not None:
        return Naming(encoder.prefix, encoder.rename, T5)
    for prefix in PREFIXES:
        if is_add_on(names, prefix):
            return Naming(prefix, str)
    looks = next((what for keys, what in _LOOKS_LIKE if any(key in n for n in names for key in keys)), "something else")
    raise QuantError(
        f"{path}: not a Wan model (no tensor {WAN_KEY}), it looks like {looks};"
        " choose a Wan transformer, an add-on for one, or the T5 text encoder"
    )
