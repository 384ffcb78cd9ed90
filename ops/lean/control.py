"""VACE's control blocks. ComfyUI has no hook to replace them, so their forwards are replaced."""

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
    """Return lean forwards for the control blocks of a VACE model; other models have none."""
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
    """A lean `VaceWanAttentionBlock.forward`.

    Args:
        c: tokens of the control branch, (batch, tokens, dim). They are overwritten unless a patch may keep them.
        x: input of the main branch, like `c`.

    Returns:
        What to add to the main branch, and the new tokens of the control branch, both like `c`.
    """
    may_be_kept = transformer_options.get("patches", {}).get("attn2_patch")
    c = c.clone(memory_format=torch.contiguous_format) if may_be_kept else c.contiguous()
    if block.block_id == 0:
        before = projection(block.before_proj, c, lambda: [c])
        for chunk in chunks(c.shape[1], plan.chunk_without_keys):
            c[:, chunk] = before(c[:, chunk]) + x[:, chunk]
        del before
    c = LeanBlock(block, plan, context_img_len, transformer_options)(c, e, freqs, context)
    after, skip = projection(block.after_proj, c, lambda: [c]), torch.empty_like(c)
    for chunk in chunks(c.shape[1], plan.chunk_without_keys):
        skip[:, chunk] = after(c[:, chunk])
    return skip, c
