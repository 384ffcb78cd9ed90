"""A Linear's product with a packed weight, decoded a tile of rows at a time."""

from __future__ import annotations

import threading

import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor
from torch.nn.functional import linear

from ..quant.kernels.op import dequantize_into
from .layout import dense

TILE_BYTES = 64 << 20
"""Of decoded weight at any time, whatever the size of the layer."""

# Rows of blocks of every type start on 16 bytes again after this many.
_ROWS = 16


class _Scratch(threading.local):
    """One tile in main memory for each thread: fresh pages cost a CPU more time than to decode into them."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def tile(self, rows: int, like: Tensor) -> Tensor:
        """(rows, like's columns) of like's dtype and device; valid until the next call."""
        if like.device.type != "cpu":  # torch's allocator there keeps memory, in the order of the stream
            return like.new_empty(rows, like.shape[-1])
        n_bytes = rows * like.shape[-1] * like.itemsize
        if len(self._bytes) < n_bytes:
            self._bytes = torch.empty(n_bytes, dtype=torch.uint8)
        return self._bytes[:n_bytes].view(like.dtype).view(rows, -1)


_scratch = _Scratch()


def packed_linear(x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
    """`linear(x, dense(weight), bias)` in memory for the output and one tile.

    Args:
        x: floating point, (..., columns).
        weight: packed, (rows, columns).
        bias: of the dtype of x, (rows,).
    """
    # A compiled graph plans its own memory, and a backward pass needs the weight that was multiplied with.
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
        whole: Tensor = linear(x, dense(weight, x.dtype), bias)
        return whole
    rows, columns = weight.shape
    step = min(rows, max(_ROWS, TILE_BYTES // (columns * x.itemsize) // _ROWS * _ROWS))
    tile = _scratch.tile(step, x)
    if step == rows:
        return linear(x, _decoded(weight, 0, tile), bias)
    flat, out = x.reshape(-1, columns), x.new_empty(*x.shape[:-1], rows)
    for start in range(0, rows, step):
        part = _decoded(weight, start, tile[: rows - start]).t()
        columns_out = out.view(-1, rows)[:, start : start + step]
        if bias is None:
            torch.mm(flat, part, out=columns_out)
        else:
            torch.addmm(bias[start : start + step], flat, part, out=columns_out)
    return out


def _decoded(weight: QuantizedTensor, start: int, tile: Tensor) -> Tensor:
    """The rows of the weight from `start`, as many as `tile` holds."""
    dequantize_into(weight._qdata[start : start + len(tile)], weight.params.qtype, tile)
    return tile
