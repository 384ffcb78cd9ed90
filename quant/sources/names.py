"""What a file holds, told by its tensor names, and the names that its tensors get.

Source: names of Diffusers: huggingface/diffusers scripts/convert_wan_to_diffusers.py @ 58eb52c, the other way round;
of Wan: comfy/ldm/wan/model.py, ComfyUI 0.30.0, which are those of github.com/Wan-Video.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from ..errors import QuantError

PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "model.model.", "net.", "transformer.", "model.")

_WAN_KEY = "head.modulation"
_DIFFUSERS_KEY = "condition_embedder.time_proj.weight"
_MODULE_NAME = re.compile(
    r"(vace_blocks|vace_patch_embedding|control_adapter|ref_conv|face_adapter|face_encoder|motion_encoder"
    r"|pose_patch_embedding|casual_audio_encoder|audio_injector|audio_proj|cond_encoder|trainable_cond_mask)\..+"
)
_MARKER_NAME = "scaled_fp8"

_LOOKS_LIKE = (
    (("lora_A.", "lora_B.", "lora_down.", "lora_up."), "a LoRA"),
    (("encoder.block.", "encoder.layers.", "text_model."), "a text encoder"),
    (("vision_model.", "visual."), "a vision encoder"),
    (("decoder.head.", "decoder.conv_in.", "decoder.up."), "a VAE"),
    (("double_blocks.",), "a Flux or Hunyuan model"),
    (("input_blocks.", "joint_blocks."), "a Stable Diffusion model"),
    (("transformer_blocks.",), "another diffusion transformer"),
)

_BLOCK = r"((?:vace_)?blocks\.\d+\.)"
_DIFFUSERS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"condition_embedder\.(time|text)_embedder\.linear_1\.", r"\1_embedding.0."),
        (r"condition_embedder\.(time|text)_embedder\.linear_2\.", r"\1_embedding.2."),
        (r"condition_embedder\.time_proj\.", "time_projection.1."),
        (r"condition_embedder\.image_embedder\.norm1\.", "img_emb.proj.0."),
        (r"condition_embedder\.image_embedder\.ff\.net\.0\.proj\.", "img_emb.proj.1."),
        (r"condition_embedder\.image_embedder\.ff\.net\.2\.", "img_emb.proj.3."),
        (r"condition_embedder\.image_embedder\.norm2\.", "img_emb.proj.4."),
        (r"condition_embedder\.image_embedder\.pos_embed$", "img_emb.emb_pos"),
        (r"((?:vace_)?patch_embedding\.)", r"\1"),
        (r"scale_shift_table$", "head.modulation"),
        (r"proj_out\.", "head.head."),
        (_BLOCK + r"scale_shift_table$", r"\1modulation"),
        (_BLOCK + r"proj_in\.", r"\1before_proj."),
        (_BLOCK + r"proj_out\.", r"\1after_proj."),
        (_BLOCK + r"ffn\.net\.0\.proj\.", r"\1ffn.0."),
        (_BLOCK + r"ffn\.net\.2\.", r"\1ffn.2."),
        # Diffusers counts the norms in the order of their use, Wan does not.
        (_BLOCK + r"norm2\.", r"\1norm3."),
        (_BLOCK + r"attn1\.to_([qkv])\.", r"\1self_attn.\2."),
        (_BLOCK + r"attn1\.to_out\.0\.", r"\1self_attn.o."),
        (_BLOCK + r"attn1\.norm_([qk])\.", r"\1self_attn.norm_\2."),
        (_BLOCK + r"attn2\.to_([qkv])\.", r"\1cross_attn.\2."),
        (_BLOCK + r"attn2\.to_out\.0\.", r"\1cross_attn.o."),
        (_BLOCK + r"attn2\.norm_([qk])\.", r"\1cross_attn.norm_\2."),
        (_BLOCK + r"attn2\.add_([kv])_proj\.", r"\1cross_attn.\2_img."),
        (_BLOCK + r"attn2\.norm_added_k\.", r"\1cross_attn.norm_k_img."),
    )
)


class Naming(NamedTuple):
    """How the tensors of a file are named."""

    prefix: str
    rename: Callable[[str], str]
    """From the name without prefix to ComfyUI's."""


def find_naming(path: Path, names: Collection[str]) -> Naming:
    """The naming of a Wan transformer, or of a module that is added to one.

    Raises:
        QuantError: anything else, with what it looks like.
    """
    for key, rename in ((_WAN_KEY, str), (_DIFFUSERS_KEY, _from_diffusers(path))):
        for prefix in PREFIXES:
            if prefix + key in names:
                return Naming(prefix, rename)
    for prefix in PREFIXES:
        if names and all(_is_of_module(name, prefix) for name in names):
            return Naming(prefix, str)
    looks = next((what for keys, what in _LOOKS_LIKE if any(key in n for n in names for key in keys)), "something else")
    raise QuantError(f"{path}: not a Wan model (no tensor {_WAN_KEY}): it looks like {looks}; only Wan is supported")


def is_module(names: Collection[str]) -> bool:
    """Whether these are the tensors (without prefix) of an add-on module, not of a transformer."""
    return _WAN_KEY not in names


def _is_of_module(name: str, prefix: str) -> bool:
    bare = name.removeprefix(prefix)
    return bare == _MARKER_NAME or (name.startswith(prefix) and _MODULE_NAME.fullmatch(bare) is not None)


def _from_diffusers(path: Path) -> Callable[[str], str]:
    def rename(name: str) -> str:
        for pattern, replacement in _DIFFUSERS:
            match = pattern.match(name)
            if match:
                return match.expand(replacement) + name[match.end() :]
        if name == _MARKER_NAME:
            return name
        raise QuantError(
            f"{path}: tensor {name}: has no known counterpart in ComfyUI's Wan; use the checkpoint in Wan's own names"
        )

    return rename
