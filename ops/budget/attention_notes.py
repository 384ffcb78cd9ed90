"""What a sampling runs besides the lean path, and what its attention needs that the prediction counts or cannot see."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher

from .. import host, host_products
from ..lean.block import is_lean_block
from ..lean.variants import variant
from .gpu_kernels import FlashAttention


def attention_of(model: ModelPatcher) -> FlashAttention:
    """Return a stand-in that allocates what the attention of a Wan MODEL allocates, as far as it is known."""
    override = _override(model)
    preferred = str(host.attention_preferences(model.model.diffusion_model))
    return FlashAttention(
        accepts_query_chunks=override is None or getattr(override, "accepts_query_chunks", False),
        eight_bit=host_products.attends_in_8_bits() or "int8" in preferred,
    )


def attention_notes(model: ModelPatcher) -> list[str]:
    """Return a sentence for everything in a Wan MODEL that is not ComfyUI's usual attention in lean blocks."""
    transformer, notes = model.model.diffusion_model, []
    override, preferred = _override(model), host.attention_preferences(transformer)
    if override is not None:
        name = getattr(override, "__qualname__", type(override).__name__)
        cut = "in chunks" if getattr(override, "accepts_query_chunks", False) else "all at once"
        notes.append(
            f"attention is that of another node ({name}): it gets the queries {cut}, and its own buffers do not count"
        )
    if host_products.attends_in_8_bits():
        notes.append("attention is in 8 bits, and the copies of queries, keys and values count")
    if preferred:
        notes.append(
            f"{len(preferred)} attentions are those that the file prefers; they get all queries at once, and those to"
            " the text run as in ComfyUI"
        )
    stock = sum(not is_lean_block(block) for block in transformer.blocks) if variant(transformer).lean_blocks else 0
    if stock:
        notes.append(
            f"{stock} of {len(transformer.blocks)} blocks run as in ComfyUI, because another node changes them; they"
            " may exceed the budget"
        )
    return notes


def _override(model: ModelPatcher) -> object:
    return model.model_options.get("transformer_options", {}).get("optimized_attention_override")
