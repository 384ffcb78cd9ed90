"""Blocks of one value each, which whole layers can consist of, and for which a search takes longest."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def encode_constants_once(
    encode: Callable[[Tensor, Tensor | None], Tensor], blocks: Tensor, importance: Tensor | None
) -> Tensor:
    """(n, block_size) float32 -> what `encode` makes of each block; of two zeros that differ in sign it sees +0.

    Importance does not matter to blocks of one value, whose weights all get the same code.
    """
    low = blocks.amin(1)
    constant = low == blocks.amax(1)
    if not constant.any():
        return encode(blocks, importance)
    values, index = torch.unique(low[constant] + 0.0, return_inverse=True)
    varied, once = blocks[~constant], values[:, None].expand(-1, blocks.shape[1])
    order = torch.empty(len(blocks), dtype=torch.int64, device=blocks.device)
    order[~constant] = torch.arange(len(varied), device=blocks.device)
    order[constant] = len(varied) + index
    weights = None if importance is None else torch.cat((importance[~constant], torch.ones_like(once)))
    return encode(torch.cat((varied, once)), weights)[order]
