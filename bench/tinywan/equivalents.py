"""Networks that are TinyWan with its channels in another order, for other roundings of the same function.

What a file costs is one draw: with other columns in a block all errors fall out anew. Only many draws tell an encoder
from its luck. Orders that change nothing else are those of the stream between the blocks, of the embedded text, of the
units of an FFN, and of the values within a head.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from wanquant.bench.tinywan.model import SHAPE
from wanquant.bench.tinywan.reference import Weights

_WIDTHS = {
    "stream": SHAPE["dim"],
    "text": SHAPE["dim"],
    "units": SHAPE["ffn_dim"],
    "values": SHAPE["dim"] // SHAPE["num_heads"],
}

# What writes a stream has it in its rows, what reads one in its last dimension.
_ROWS = {
    "stream": r"(patch_embedding|time_embedding\.2|time_projection\.1|.*\.o|.*\.ffn\.2|.*\.norm3)\.(weight|bias)",
    "text": r"text_embedding\.2\.(weight|bias)",
    "units": r".*\.ffn\.0\.(weight|bias)",
    "values": r".*\.v\.(weight|bias)",
}
_COLUMNS = {
    "stream": r"(time_projection\.1|.*\.self_attn\.[qkv]|.*\.cross_attn\.q|.*\.ffn\.0|head\.head)\.weight|.*modulation",
    "text": r".*\.cross_attn\.[kv]\.weight",
    "units": r".*\.ffn\.2\.weight",
    "values": r".*\.o\.weight",
}


def reordered(weights: Weights, seed: int) -> Weights:
    """Weights of the same function, but for float rounding, in an order for each seed; 0 leaves them as they are."""
    if not seed:
        return weights
    generator = torch.Generator().manual_seed(seed)
    orders = {part: torch.randperm(width, generator=generator) for part, width in _WIDTHS.items()}
    return {name: _reordered(name, tensor, orders) for name, tensor in weights.items()}


def _reordered(name: str, tensor: Tensor, orders: dict[str, Tensor]) -> Tensor:
    for patterns, dim in ((_ROWS, 0), (_COLUMNS, -1)):
        for part, pattern in patterns.items():
            if re.fullmatch(pattern, name):
                tensor = _along(tensor, dim, orders[part])
    return tensor


def _along(tensor: Tensor, dim: int, order: Tensor) -> Tensor:
    """In this order along a dimension, again and again where it is longer: one for every head or modulation."""
    starts = torch.arange(0, tensor.shape[dim], len(order))
    return tensor.index_select(dim, (starts[:, None] + order).flatten())
