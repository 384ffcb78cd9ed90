"""Names of LoRA tensors as trainers write them, under the names that ComfyUI's LoRA loader looks up.

Source: comfy/lora.py model_lora_keys_unet and comfy/weight_adapter, ComfyUI 0.30.0; huggingface/peft save_and_load.py
(`base_model.model.`, and the adapter's name behind `lora_A`); kohya-ss/musubi-tuner networks/lora.py (`lora_unet_`);
modelscope/DiffSynth-Studio (bare names and `pipe.dit.`); bghira/SimpleTuner (`lycoris_`, `transformer.`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from .diffusers import wan_name
from .names import CONTAINER, unwrapped

PREFIX = "diffusion_model."
"""What ComfyUI writes before the names of a diffusion model's tensors."""

_START = re.compile(rf"(?:{CONTAINER})*(?:(?:lora_transformer|lora_unet|lora_dit|lycoris)[._]+)?(?:{CONTAINER})*")
_END = re.compile(
    r"(?:\.default)?(?P<end>"
    r"\.lora_(?:A|B|up|down|mid|linear_layer)\b.*|[._]lora\.(?:up|down)\b.*|\.(?:hada|lokr|oft|boft)_.*|\.[ab][12]\.weight"
    r"|\.(?:alpha|dora_scale|reshape_weight|rescale))$"
)
_ADAPTER = re.compile(r"(\.lora_[AB])(?:\.[^.]+)?(\.weight)")
_BLOCK = re.compile(r"((?:vace_)?blocks)[._](\d+)[._](.+)")

_IN_BLOCK = (
    *(f"{attention}.{part}" for attention in ("self_attn", "cross_attn") for part in ("q", "k", "v", "o")),
    *("cross_attn.k_img", "cross_attn.v_img", "ffn.0", "ffn.2", "before_proj", "after_proj"),
)
_IN_BLOCK_OF_DIFFUSERS = (
    *(f"{attention}.{part}" for attention in ("attn1", "attn2") for part in ("to_q", "to_k", "to_v", "to_out.0")),
    *("attn2.add_k_proj", "attn2.add_v_proj", "ffn.net.0.proj", "ffn.net.2", "proj_in", "proj_out"),
)
_OUTSIDE = (
    *("patch_embedding", "vace_patch_embedding", "head.head", "time_projection.1", "img_emb.proj.1", "img_emb.proj.3"),
    *(f"{kind}_embedding.{layer}" for kind in ("text", "time") for layer in (0, 2)),
)
_OUTSIDE_OF_DIFFUSERS = (
    *(f"condition_embedder.{kind}_embedder.linear_{layer}" for kind in ("text", "time") for layer in (1, 2)),
    *("condition_embedder.time_proj", "proj_out", "condition_embedder.image_embedder.ff.net.0.proj"),
    "condition_embedder.image_embedder.ff.net.2",
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


def other_names(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return the tensors of a LoRA whose names ComfyUI does not look up.

    Args:
        names: the names of the LoRA's tensors.

    Returns:
        By the layer (`diffusion_model.blocks.0.ffn.0`), the names in the LoRA, by the names that ComfyUI looks up.
    """
    layers: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        end = _END.search(name)
        layer = layer_name(name[: end.start()]) if end else None
        if end and layer is not None:
            new = _ADAPTER.sub(r"\1\2", PREFIX + layer + end["end"])
            layers[PREFIX + layer].setdefault(new, name)
    return {
        layer: tensors
        for layer, tensors in layers.items()
        if any(not _is_known(layer, new, name) for new, name in tensors.items())
    }


def _is_known(layer: str, new: str, name: str) -> bool:
    """Return whether ComfyUI's loader looks a tensor up by the name that it has."""
    return name in (new, "lora_unet_" + _flat(layer.removeprefix(PREFIX)) + new.removeprefix(layer))
