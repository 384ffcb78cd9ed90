"""TinyWan with its channels in another order: the same function, but rounded differently.

The error of a file is one random draw, because another order puts other weights into a quantization block. Only many
draws show which encoder is better. Four orders leave the function unchanged: those of the residual stream, of the
embedded text, of the hidden units of an FFN, and of the values within a head.
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

# A weight that writes a stream has it in its rows, one that reads it in its last dimension.
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
    """Return weights of the same function, up to float rounding, in the order of a seed; seed 0 changes nothing."""
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
    """Reorder a dimension, repeating the order for every head or modulation where the dimension is longer."""
    starts = torch.arange(0, tensor.shape[dim], len(order))
    return tensor.index_select(dim, (starts[:, None] + order).flatten())
