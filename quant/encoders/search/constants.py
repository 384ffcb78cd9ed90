"""Blocks whose elements all have one value: whole layers can consist of them, and a search takes longest for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def encode_constants_once(
    encode: Callable[[Tensor, Tensor | None], Tensor], blocks: Tensor, importance: Tensor | None
) -> Tensor:
    """Encode blocks, each distinct constant block only once.

    Importance has no effect on constant blocks, since their elements all get the same code. Constant blocks of -0 are
    encoded as blocks of +0.

    Args:
        encode: returns uint8 (n, type_size) for blocks and importance as below.
        blocks: float32 (n, block_size).
        importance: float32 (n, block_size), or None.

    Returns:
        uint8 (n, type_size).
    """
    low = blocks.amin(1)
    is_constant = low == blocks.amax(1)
    if not is_constant.any():
        return encode(blocks, importance)
    values, index = torch.unique(low[is_constant] + 0.0, return_inverse=True)
    varied, constants = blocks[~is_constant], values[:, None].expand(-1, blocks.shape[1])
    order = torch.empty(len(blocks), dtype=torch.int64, device=blocks.device)
    order[~is_constant] = torch.arange(len(varied), device=blocks.device)
    order[is_constant] = len(varied) + index
    if importance is not None:
        importance = torch.cat((importance[~is_constant], torch.ones_like(constants)))
    return encode(torch.cat((varied, constants)), importance)[order]
