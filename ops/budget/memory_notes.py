"""What a sampling runs besides the lean path, and what its attention needs that the prediction counts or cannot see."""

from __future__ import annotations

from typing import Any

from comfy.model_patcher import ModelPatcher

from ...quant.units import counted
from .. import host, host_products
from ..lean.apply import runs_lean
from ..lean.variants import variant
from .gpu_kernels import FlashAttention

_BLOCK_PATCHES = ("attn1_patch", "attn2_patch", "double_block")


def attention_of(model: ModelPatcher) -> FlashAttention:
    """Return a stand-in that allocates what the attention of a Wan MODEL allocates, as far as it is known."""
    override = _override(model)
    preferred = str(host.attention_preferences(model.model.diffusion_model))
    return FlashAttention(
        accepts_query_chunks=override is None or getattr(override, "accepts_query_chunks", False),
        eight_bit=host_products.attends_in_8_bits() or "int8" in preferred,
    )


def memory_notes(model: ModelPatcher) -> list[str]:
    """Return a sentence for everything in a Wan MODEL that is not ComfyUI's usual attention in lean blocks."""
    transformer, notes = model.model.diffusion_model, []
    override, preferred = _override(model), host.attention_preferences(transformer)
    if override is not None:
        cut = "in chunks" if getattr(override, "accepts_query_chunks", False) else "all at once"
        notes.append(
            f"attention is that of another node ({_name(override)}): it gets the queries {cut}, and its own buffers do"
            " not count"
        )
    if host_products.attends_in_8_bits():
        notes.append("attention is in 8 bits, and the copies of queries, keys and values count")
    if preferred:
        notes.append(
            f"the file prefers other functions for {counted(len(preferred), 'attention')}: they get all queries"
            " at once, and attention to the text runs as in ComfyUI"
        )
    return notes + stock_notes(model)


def stock_notes(model: ModelPatcher) -> list[str]:
    """Return a sentence for everything in a Wan MODEL that no memory plan makes smaller."""
    transformer, notes = model.model.diffusion_model, []
    known = variant(transformer)
    stock = sum(not runs_lean(block) for block in transformer.blocks)
    if not known.lean_blocks:
        notes.append(f"{known.models} runs as in ComfyUI ({known.stock}), so a smaller budget cannot hold")
    elif stock:
        notes.append(
            f"ComfyUI's own forward runs {stock} of {counted(len(transformer.blocks), 'block')}, because another node"
            " changes them or this WanQuant does not know them; that may exceed the budget"
        )
    patches = _options(model).get("patches", {})
    names = {_name(patch) for kind in _BLOCK_PATCHES for patch in patches.get(kind, ())}
    if names:
        notes.append(
            f"{', '.join(sorted(names))} of another node gets all tokens in each block; what it needs does not count"
        )
    return notes


def _override(model: ModelPatcher) -> object:
    return _options(model).get("optimized_attention_override")


def _options(model: ModelPatcher) -> dict[str, Any]:
    options: dict[str, Any] = model.model_options.get("transformer_options", {})
    return options


def _name(function: object) -> str:
    return getattr(function, "__qualname__", type(function).__name__)
