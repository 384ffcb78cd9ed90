"""Wan's tensors under the names of Diffusers.

Source: huggingface/diffusers scripts/convert_wan_to_diffusers.py @ 58eb52c, the other way round.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import QuantError
from . import animate
from .layers import MARKER
from .renaming import rename, rules

KEY = "condition_embedder.time_proj.weight"
QUERY = "blocks.0.attn1.to_q.weight"
"""The names of two tensors that every transformer has."""

_BLOCK = r"((?:vace_)?blocks\.\d{1,9}\.)"
_RULES = (
    *rules(
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
        # Diffusers numbers the norms in the order of their use; Wan does not.
        (_BLOCK + r"norm2\.", r"\1norm3."),
        (_BLOCK + r"attn1\.to_([qkv])\.", r"\1self_attn.\2."),
        (_BLOCK + r"attn1\.to_out\.0\.", r"\1self_attn.o."),
        (_BLOCK + r"attn1\.norm_([qk])\.", r"\1self_attn.norm_\2."),
        (_BLOCK + r"attn2\.to_([qkv])\.", r"\1cross_attn.\2."),
        (_BLOCK + r"attn2\.to_out\.0\.", r"\1cross_attn.o."),
        (_BLOCK + r"attn2\.norm_([qk])\.", r"\1cross_attn.norm_\2."),
        (_BLOCK + r"attn2\.add_([kv])_proj\.", r"\1cross_attn.\2_img."),
        (_BLOCK + r"attn2\.norm_added_k\.", r"\1cross_attn.norm_k_img."),
    ),
    *animate.RULES,
)


def wan_name(layer: str) -> str:
    """Return Wan's name of a layer of Diffusers'; other names stay as they are."""
    return (rename(f"{layer}.", _RULES) or rename(layer, _RULES) or layer).removesuffix(".")


def renaming(path: Path) -> Callable[[str], str | None]:
    """Return a function from a tensor name in the file `path` to ComfyUI's name, or to None for a marker."""

    def rename_known(name: str) -> str | None:
        renamed = rename(name, _RULES)
        if renamed is None and name != MARKER:
            raise QuantError(
                f"{path}: tensor {name}: has no known counterpart in ComfyUI's Wan;"
                " use a checkpoint with Wan's own tensor names"
            )
        return renamed

    return rename_known
