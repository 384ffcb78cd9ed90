"""With dynamic VRAM: all weights of a Wan block on their way at once, while the block before it still computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import host

Block = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
"""The host's replacement of a block: (its arguments, {"original_block": the block}) -> {"img": output}."""


def prefetch_blocks(execute: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    """A DIFFUSION_MODEL wrapper that hands each block to the host's prefetch queue before it runs.

    Without it each layer asks for its weights as it runs, and its copy overlaps the one layer before. The queue wants
    room for the packed weights of two blocks. Nothing changes where the host has no queue (another memory mode, no
    streams) or prefetches by itself, where a node runs blocks its own way, and where a block is in use before its turn.
    """
    options = host.prefetch_options((*args, *kwargs.values()))
    replaced = options.get("patches_replace", {})
    blocks: list[torch.nn.Module] = list(getattr(execute.class_obj, "blocks", ()))
    queue = None
    if not replaced.get("dit") and not _prefetched_otherwise(execute.class_obj, blocks):
        queue = host.prefetch_queue(blocks, x.device, options)
    if queue is None:
        return execute(x, *args, **kwargs)

    def then(block: torch.nn.Module | None) -> None:
        host.advance(queue, x.device, block)

    # The host made these options for this call, with all that lies deeper shared between calls.
    hooks = {("double_block", index): _after(then, block) for index, block in enumerate(blocks)}
    options["patches_replace"] = {**replaced, "dit": hooks}
    output = execute(x, *args, **kwargs)
    # Nobody would use, and so give back, the weights of blocks that a node left out.
    del queue[1:-1]
    then(None)
    return output


def _prefetched_otherwise(model: Any, blocks: list[torch.nn.Module]) -> bool:  # noqa: ANN401
    """By the model itself, or by what runs ahead of a block's turn: the pose branch of Wan Animate 2."""
    return host.prefetches(model) or any(hasattr(block, "forward_pose") for block in blocks)


def _after(fetch: Callable[[torch.nn.Module], None], block: torch.nn.Module) -> Block:
    def run(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        fetch(block)
        output: dict[str, Any] = extra["original_block"](args)
        return output

    return run
