"""VACE's control blocks, which the host calls without a hook."""

from __future__ import annotations

from functools import partial
from typing import Any

import comfy.ldm.wan.model as wan
import torch
from torch import Tensor

from ..host import Forwards
from .block import LeanBlock
from .memory_plan import MemoryPlan
from .modulation import chunks
from .weights import is_untouched, projection


def control_forwards(model: wan.WanModel, plan: MemoryPlan) -> Forwards:
    """Lean forwards of a VACE model's control blocks; none for any other model."""
    blocks = [block for block in getattr(model, "vace_blocks", ()) if type(block) is wan.VaceWanAttentionBlock]
    return {block: partial(_forward, block, plan) for block in blocks if is_untouched(block)}


def _forward(
    block: wan.VaceWanAttentionBlock,
    plan: MemoryPlan,
    c: Tensor,
    x: Tensor,
    *,
    e: Tensor,
    freqs: Tensor,
    context: Tensor,
    context_img_len: int | None,
    transformer_options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """`VaceWanAttentionBlock.forward`: what to add to the main branch, and the control branch, in its memory.

    Args:
        c: the control branch, (batch, tokens, dim).
        x: input of the main branch, like `c`.
    """
    seen = transformer_options.get("patches", {}).get("attn2_patch")
    c = c.clone(memory_format=torch.contiguous_format) if seen else c.contiguous()
    if block.block_id == 0:
        before = projection(block.before_proj, c)
        for chunk in chunks(c.shape[1], plan.token_chunk):
            c[:, chunk] = before(c[:, chunk]) + x[:, chunk]
        del before
    c = LeanBlock(block, plan, context_img_len, transformer_options)(c, e, freqs, context)
    after, skip = projection(block.after_proj, c), torch.empty_like(c)
    for chunk in chunks(c.shape[1], plan.token_chunk):
        skip[:, chunk] = after(c[:, chunk])
    return skip, c
