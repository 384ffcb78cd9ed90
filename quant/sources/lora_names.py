"""Names of LoRA tensors as trainers write them, under the names that ComfyUI's LoRA loader looks up.

Source: comfy/lora.py model_lora_keys_unet and comfy/weight_adapter, ComfyUI 0.30.0; huggingface/peft save_and_load.py
(`base_model.model.`, and the adapter's name behind `lora_A`); kohya-ss/musubi-tuner networks/lora.py (`lora_unet_`);
modelscope/DiffSynth-Studio (bare names and `pipe.dit.`); bghira/SimpleTuner (`lycoris_`, `transformer.`);
ModelTC/lightx2v (`diff_m`, the difference of a modulation).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from .diffusers import wan_name
from .names import CONTAINER, unwrapped
from .renaming import rename, rules

PREFIX = "diffusion_model."
"""What ComfyUI writes before the names of a diffusion model's tensors."""

_START = re.compile(rf"(?:{CONTAINER})*(?:(?:lora_transformer|lora_unet|lora_dit|lycoris)[._]+)?(?:{CONTAINER})*")
_END = re.compile(
    r"(?:\.default)?(?P<end>"
    r"\.lora_(?:A|B|up|down|mid|linear_layer|magnitude_vector)\b.*|[._]lora\.(?:up|down)\b.*"
    r"|\.(?:hada|lokr|oft|boft)_.*|\.[ab][12]\.weight|\.(?:diff(?:_[bm])?|set_weight|[wb]_norm)"
    r"|\.(?:alpha|dora_scale|reshape_weight|rescale))$"
)
_ENDS = rules(
    (r"(\.lora_[AB])(?:\.[^.]+)?(\.weight)$", r"\1\2"),
    (r"\.lora_(?:B|up)(?:\.[^.]+)?\.bias$", ".diff_b"),
    (r"\.lora_magnitude_vector(?:\..+)?$", ".dora_scale"),
)
"""What ComfyUI looks up for what trainers write behind the name of a layer."""
_BLOCK = re.compile(r"((?:vace_)?blocks)[._](\d+)[._](.+)")
# What ComfyUI and the trainers look for by themselves, such as the names of text encoders.
_OF_THE_HOST = (PREFIX, "lora_unet_", "lora_te", "text_encoder")

# Parameters of a module itself. ComfyUI looks them up by their full names only.
_WITHOUT_WEIGHT = ("modulation", "emb_pos")
_ATTENTIONS = ("self_attn", "cross_attn")
_IN_BLOCK = (
    *(f"{attention}.{part}" for attention in _ATTENTIONS for part in ("q", "k", "v", "o", "norm_q", "norm_k")),
    *("cross_attn.k_img", "cross_attn.v_img", "cross_attn.norm_k_img", "ffn.0", "ffn.2", "norm3", "modulation"),
    *("before_proj", "after_proj"),
)
_OF_DIFFUSERS = ("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k")
_IN_BLOCK_OF_DIFFUSERS = (
    *(f"{attention}.{part}" for attention in ("attn1", "attn2") for part in _OF_DIFFUSERS),
    *("attn2.add_k_proj", "attn2.add_v_proj", "attn2.norm_added_k", "ffn.net.0.proj", "ffn.net.2", "norm2"),
    *("scale_shift_table", "proj_in", "proj_out"),
)
_OUTSIDE = (
    *("patch_embedding", "vace_patch_embedding", "head.head", "head.modulation", "time_projection.1"),
    *("img_emb.emb_pos", *(f"img_emb.proj.{layer}" for layer in (0, 1, 3, 4))),
    *(f"{kind}_embedding.{layer}" for kind in ("text", "time") for layer in (0, 2)),
)
_OUTSIDE_OF_DIFFUSERS = (
    *(f"condition_embedder.{kind}_embedder.linear_{layer}" for kind in ("text", "time") for layer in (1, 2)),
    *("condition_embedder.time_proj", "proj_out", "scale_shift_table"),
    *(f"condition_embedder.image_embedder.{part}" for part in ("ff.net.0.proj", "ff.net.2", "norm1", "norm2")),
    "condition_embedder.image_embedder.pos_embed",
)


def _flat(name: str) -> str:
    return name.replace(".", "_")


_BLOCK_LAYERS = {_flat(name): name for name in _IN_BLOCK} | {
    _flat(name): wan_name(f"blocks.0.{name}").removeprefix("blocks.0.") for name in _IN_BLOCK_OF_DIFFUSERS
}
_OTHER_LAYERS = {_flat(name): name for name in _OUTSIDE} | {_flat(n): wan_name(n) for n in _OUTSIDE_OF_DIFFUSERS}


def layer_name(stem: str) -> str | None:
    """Return Wan's name for a layer as a LoRA names it, or None if it is not a layer of Wan.

    The prefix may be any that trainers write. The rest may be Wan's name or Diffusers', with dots or underscores.
    """
    bare = _START.sub("", unwrapped(stem), count=1)
    if match := _BLOCK.fullmatch(bare):
        layer = _BLOCK_LAYERS.get(_flat(match[3]))
        return layer and f"{match[1]}.{match[2]}.{layer}"
    return _OTHER_LAYERS.get(_flat(bare))


class LoRANames(NamedTuple):
    """The names of a LoRA's tensors, as far as ComfyUI does not find them as they are."""

    pairs: list[tuple[str, str]]
    """Names that ComfyUI looks up, and the names in the LoRA, for all tensors of a layer of which one has another."""
    left_over: list[str]
    """The names, beside such layers, that neither ComfyUI nor this pack knows."""


def lora_names(names: Iterable[str]) -> LoRANames:
    """Return what to rename in a LoRA with tensors of these names."""
    layers: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
    unknown = []
    for name in names:
        layer, end = _layer_and_end(name)
        if layer is not None:
            layers[layer].append((PREFIX + layer + end, name))
        elif not name.startswith(_OF_THE_HOST):
            unknown.append(name)
    others = (pairs for layer, pairs in layers.items() if not all(_is_known(layer, *pair) for pair in pairs))
    renamed = [pair for pairs in others for pair in pairs]
    return LoRANames(renamed, unknown if renamed else [])


def _layer_and_end(name: str) -> tuple[str | None, str]:
    """Return Wan's name for the layer of a tensor, or None, and what ComfyUI looks up behind it."""
    match = _END.search(name)
    if match is None:
        return None, ""
    stem, end = name[: match.start()], match["end"]
    if end == ".diff_m":
        return layer_name(f"{stem}.modulation"), ".diff"
    return layer_name(stem), rename(end, _ENDS) or end


def _is_known(layer: str, new: str, name: str) -> bool:
    """Return whether ComfyUI's loader looks a tensor up by the name that it has."""
    own = "lora_unet_" + _flat(layer) + new.removeprefix(PREFIX + layer)
    return name == new or (name == own and not layer.endswith(_WITHOUT_WEIGHT))
