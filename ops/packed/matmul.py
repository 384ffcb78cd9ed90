"""A Linear's product with a packed weight, decoded and patched a tile of rows at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from math import lcm

import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor
from torch.nn.functional import linear

from ...quant.torch_op import dequantize_into
from .. import host
from .layout import dense
from .patches import OnTheFly, PatchRows

WeightFunction = Callable[[Tensor], Tensor]
"""The host's: whole decoded weight -> weight. Ours, `OnTheFly`, also patches some of its rows."""

TILE_BYTES = 64 << 20
"""Of decoded weight at any time, whatever the size of the layer."""

# Before macOS 15 a product there never reaches a slice given as `out`, and no error says so.
# Source: https://github.com/pytorch/pytorch/issues/104832.
_LOSES_SLICES = ("mps",)

# Rows of blocks of every type start on 16 bytes again after this many.
_ROWS = 16


class _Scratch(threading.local):
    """One tile in main memory for each thread: fresh pages cost a CPU more time than to decode into them."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def tile(self, rows: int, like: Tensor) -> Tensor:
        """(rows, like's columns) of like's dtype and device; valid until the next call."""
        n_bytes = rows * like.shape[-1] * like.itemsize
        # torch's allocator elsewhere keeps memory, in the order of the stream; here only a tile's.
        if like.device.type != "cpu" or n_bytes > TILE_BYTES:
            return like.new_empty(rows, like.shape[-1])
        if len(self._bytes) < n_bytes:
            self._bytes = torch.empty(n_bytes, dtype=torch.uint8)
        return self._bytes[:n_bytes].view(like.dtype).view(rows, -1)


_scratch = _Scratch()


class DecodedRows:
    """Rows of a packed weight, decoded and patched when they are asked for; for one use of the weight."""

    def __init__(self, weight: QuantizedTensor, functions: Sequence[WeightFunction], like: Tensor) -> None:
        """
        Args:
            weight: (rows, columns), on the device of `like`.
            functions: applied in turn, each to the result of the one before.
            like: its dtype and device are those of the rows.
        """
        self._weight, self._packed = weight, host.packed_bytes(weight)
        self._patches = [_patch_rows(function, like) for function in functions]
        whole = len(weight)
        self.row_multiple = lcm(1, *(f.row_multiple if isinstance(f, OnTheFly) else whole for f in functions))
        """Rows can be had from multiples of this, and as many; all at once where a function needs the whole weight."""

    def decode(self, start: int, out: Tensor) -> Tensor:
        """As many rows from `start` as `out`, contiguous, has. Writes to it and returns it, or what a function made."""
        dequantize_into(self._packed[start : start + len(out)], self._weight.params.qtype, out)
        for patch in self._patches:
            out = patch(out, start)
        return out


def _patch_rows(function: WeightFunction, like: Tensor) -> PatchRows:
    if isinstance(function, OnTheFly):
        return function.bind(like.device, like.dtype)
    return lambda weight, _: function(weight)


def decoded_tiles(
    weight: QuantizedTensor, functions: Sequence[WeightFunction], like: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a packed weight after `functions`, of dtype and device of `like`; each tile valid until the next."""
    rows, columns = weight.shape
    decoded = DecodedRows(weight, functions, like)
    multiple = lcm(_ROWS, decoded.row_multiple)
    step = min(rows, max(multiple, TILE_BYTES // (columns * like.itemsize) // multiple * multiple))
    tile = _scratch.tile(step, like)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        yield part, decoded.decode(start, tile[: part.stop - start])


def needs_whole(x: Tensor, bias: Tensor | None, functions: Sequence[WeightFunction]) -> bool:
    """Whether a graph is made of the product: a compiled one plans its own memory, and a backward pass needs the weight
    that was multiplied with. What is trained may be what a function of another node adds to weight or bias."""
    trained = x.requires_grad or (bias is not None and bias.requires_grad)
    trained = trained or not all(isinstance(function, OnTheFly) for function in functions)
    return torch.compiler.is_compiling() or (torch.is_grad_enabled() and trained)


def packed_linear(
    x: Tensor, weight: QuantizedTensor, bias: Tensor | None, functions: Sequence[WeightFunction] = ()
) -> Tensor:
    """`linear(x, dense(weight), bias)`, in memory for the output and one tile; the weight after `functions`.

    Args:
        x: floating point, (..., columns).
        weight: packed, (rows, columns).
        bias: of the dtype of x, (rows,).
    """
    if needs_whole(x, bias, functions):
        whole = dense(weight, x.dtype)
        for function in functions:
            whole = function(whole)
        return linear(x, whole, bias)
    rows, columns = weight.shape
    flat, out = x.reshape(-1, columns), x.new_empty(*x.shape[:-1], rows)
    for part, tile in decoded_tiles(weight, functions, x):
        product, part_bias = out.view(-1, rows)[:, part], None if bias is None else bias[part]
        if x.device.type in _LOSES_SLICES:
            product.copy_(linear(flat, tile, part_bias))
        elif part_bias is None:
            torch.mm(flat, tile.t(), out=product)
        else:
            torch.addmm(part_bias, flat, tile.t(), out=product)
    return out
