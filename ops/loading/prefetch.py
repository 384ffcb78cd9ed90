"""Copies the weights of a Wan block to the accelerator while the previous block computes, with dynamic VRAM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import host

Block = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
"""A block replacement of the host's: (arguments of the block, {"original_block": the block}) -> {"img": output}."""


def prefetch_blocks(execute: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    """Pass each block to the host's prefetch queue before it runs; a DIFFUSION_MODEL wrapper.

    Without this, each layer requests its weights when it runs, and the copy overlaps with one layer only. The queue
    needs memory for the packed weights of two blocks.

    The wrapper does nothing if the host has no queue (another memory mode, no streams) or prefetches itself. The same
    holds if a node replaces blocks, or if a block is used before its turn.

    Args:
        execute: the host's executor of the wrapped call.
        x: the latent, floating point, (batch, channels, frames, height, width).

    Returns:
        The prediction of the model, of the shape of x.
    """
    options = host.prefetch_options((*args, *kwargs.values()))
    replaced = options.get("patches_replace", {})
    blocks: list[torch.nn.Module] = list(getattr(execute.class_obj, "blocks", ()))
    queue = None
    if not replaced.get("dit") and not _prefetched_otherwise(execute.class_obj, blocks):
        queue = host.prefetch_queue(blocks, x.device, options)
    if queue is None:
        return execute(x, *args, **kwargs)

    def fetch(block: torch.nn.Module | None) -> None:
        host.advance(queue, x.device, block)

    # These options are of this call only, but the dicts in them are shared between calls.
    hooks = {("double_block", index): _after(fetch, block) for index, block in enumerate(blocks)}
    options["patches_replace"] = {**replaced, "dit": hooks}
    output = execute(x, *args, **kwargs)
    # Blocks that a node skipped would never free their weights.
    del queue[1:-1]
    fetch(None)
    return output


def _prefetched_otherwise(model: Any, blocks: list[torch.nn.Module]) -> bool:  # noqa: ANN401
    """Return whether the model prefetches itself, or uses blocks early, as the pose branch of Wan Animate 2 does."""
    return host.prefetches(model) or any(hasattr(block, "forward_pose") for block in blocks)


def _after(fetch: Callable[[torch.nn.Module], None], block: torch.nn.Module) -> Block:
    def run(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        fetch(block)
        output: dict[str, Any] = extra["original_block"](args)
        return output

    return run
