"""Blocks of one value each, which whole layers can consist of, and for which a search takes longest."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def encode_constants_once(encode: Callable[[Tensor], Tensor], blocks: Tensor) -> Tensor:
    """(n, block_size) float32 -> what `encode` makes of each block; of two zeros that differ in sign it sees +0."""
    low = blocks.amin(1)
    constant = low == blocks.amax(1)
    if not constant.any():
        return encode(blocks)
    values, index = torch.unique(low[constant] + 0.0, return_inverse=True)
    varied = blocks[~constant]
    order = torch.empty(len(blocks), dtype=torch.int64, device=blocks.device)
    order[~constant] = torch.arange(len(varied), device=blocks.device)
    order[constant] = len(varied) + index
    return encode(torch.cat((varied, values[:, None].expand(-1, blocks.shape[1]))))[order]
