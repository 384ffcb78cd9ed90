"""The matrix product with a packed weight, which is dequantized and patched a tile of rows at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from math import lcm

import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor
from torch.nn.functional import linear

from ...quant.torch_op import dequantize_into
from .. import host
from .layout import dense
from .patches import BoundPatches, OnTheFly, PatchRows

WeightFunction = Callable[[Tensor], Tensor]
"""A function in the host's list for a layer: whole dequantized weight -> weight.

`OnTheFly` of this pack can also patch some of the rows.
"""

HeldProduct = Callable[[Tensor, Tensor | None], Tensor]
"""A product with rows of a weight that were prepared for several calls: (x, bias of these rows) -> output features."""

TILE_BYTES = 64 << 20
"""The largest size of a tile of dequantized rows, unless a function needs the whole weight or the output is larger."""

# On these devices a product does not arrive in a slice given as `out` before macOS 15, and no error is raised.
# Source: https://github.com/pytorch/pytorch/issues/104832.
_LOSES_OUT_SLICES = ("mps",)

# For every ggml type this number of rows takes a multiple of 16 bytes.
_ALIGNED_ROWS = 16


class _Scratch(threading.local):
    """One tile in main memory per thread: for a CPU, new pages cost more time than dequantizing into old ones."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def tile(self, rows: int, like: Tensor) -> Tensor:
        """Return (rows, columns of `like`) of its dtype and device; the next call overwrites it."""
        n_bytes = rows * like.shape[-1] * like.itemsize
        # Other devices have an allocator that reuses memory, and larger tiles are too rare to keep.
        if like.device.type != "cpu" or n_bytes > TILE_BYTES:
            return like.new_empty(rows, like.shape[-1])
        if len(self._bytes) < n_bytes:
            self._bytes = torch.empty(n_bytes, dtype=torch.uint8)
        return self._bytes[:n_bytes].view(like.dtype).view(rows, -1)


_scratch = _Scratch()


class PatchedRows:
    """The rows of a packed weight with its patches, dequantized on request, for one use of the weight.

    Args:
        weight: packed, (rows, columns), on the device of `like`.
        functions: applied to the dequantized rows in turn.
        like: a tensor of the dtype and on the device that the rows get.
    """

    def __init__(self, weight: QuantizedTensor, functions: Sequence[WeightFunction], like: Tensor) -> None:
        self.packed, self.qtype, self.shape = host.packed_bytes(weight), weight.params.qtype, weight.shape
        self.functions, self._bound_to = tuple(functions), (like.device, like.dtype)
        whole = len(weight)
        self.row_multiple = lcm(1, *(f.row_multiple if isinstance(f, OnTheFly) else whole for f in functions))
        """`start` and the number of rows must be multiples of this: all rows if a function needs the whole weight."""

    @property
    def is_patched(self) -> bool:
        return bool(self.functions)

    @cached_property
    def _patches(self) -> list[PatchRows]:
        """Bound at the first use: rows that were kept need no factors on the device."""
        return [_patch_rows(function, *self._bound_to) for function in self.functions]

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """The up (rows, rank) and down (rank, columns) matrix, float, if the rows have LoRAs and no other patch."""
        (only, *others) = self._patches or (None,)
        return only.factors if isinstance(only, BoundPatches) and not others else None

    def dequantize_rows(self, start: int, out: Tensor) -> Tensor:
        """Dequantize and patch the rows from `start` on.

        Args:
            out: contiguous, (rows to dequantize, columns), of the dtype and device of `like`. It is overwritten.

        Returns:
            `out`, or a tensor of its shape that the last function returned.
        """
        dequantize_into(self.packed[start : start + len(out)], self.qtype, out)
        for patch in self._patches:
            out = patch(out, start)
        return out


def _patch_rows(function: WeightFunction, device: torch.device, dtype: torch.dtype) -> PatchRows:
    if isinstance(function, OnTheFly):
        return function.bind(device, dtype)
    return lambda weight, _: function(weight)


def dequantized_tiles(patched: PatchedRows, rows: slice, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows of a packed weight, patched, as tiles that the next one overwrites.

    Args:
        rows: the first and the number of them are multiples of `patched.row_multiple`.
        like: a tensor of the dtype and on the device that the tiles get.

    Yields:
        Which rows, counted from the first of `rows`, and the tile, (number of these rows, columns).
    """
    total, columns = rows.stop - rows.start, patched.shape[1]
    multiple = lcm(_ALIGNED_ROWS, patched.row_multiple)
    most = max(multiple, TILE_BYTES // (columns * like.itemsize) // multiple * multiple)
    count = -(-total // most)
    step = min(total, -(-total // count // multiple) * multiple)
    tile = _scratch.tile(step, like.new_empty(0, columns))
    for start in range(0, total, step):
        part = slice(start, min(start + step, total))
        yield part, patched.dequantize_rows(rows.start + start, tile[: part.stop - start])


def hold_dense(patched: PatchedRows, rows: slice, like: Tensor, tokens: int) -> HeldProduct:
    """Dequantize rows of a packed weight once, for products with many chunks of tokens.

    Args:
        rows: as for `dequantized_tiles`.
        like: floating point, (..., channels), of the dtype and on the device of the chunks.
        tokens: of all chunks together.
    """
    held = patched.dequantize_rows(rows.start, like.new_empty(rows.stop - rows.start, patched.shape[1]))
    return lambda x, bias: linear(x, held, bias)


def needs_whole_weight(x: Tensor, bias: Tensor | None, functions: Sequence[WeightFunction]) -> bool:
    """Return whether the product must use the whole weight at once.

    A compiled graph plans its own memory. A backward pass needs the weight that was multiplied with.

    Args:
        x: the input, floating point, (..., in_features).
        bias: (out_features,).
        functions: those of other nodes may add parameters that are being trained.
    """
    trained = x.requires_grad or (bias is not None and bias.requires_grad)
    trained = trained or not all(isinstance(function, OnTheFly) for function in functions)
    return torch.compiler.is_compiling() or (torch.is_grad_enabled() and trained)


def packed_linear(
    x: Tensor, weight: QuantizedTensor, bias: Tensor | None, functions: Sequence[WeightFunction] = ()
) -> Tensor:
    """Return `linear(x, dense(weight), bias)`, with `functions` applied to the dequantized weight.

    This needs memory for the output and one tile, unless `needs_whole_weight`. On a GPU, a tile may be as large as the
    output: the product with a whole weight is up to 14 % faster (bench/results/gpu-dequant-h100.json), because its
    output is contiguous.

    Args:
        x: floating point, (..., columns).
        weight: packed, (rows, columns).
        bias: the dtype of x, (rows,).
        functions: applied to the dequantized weight in turn.

    Returns:
        The dtype of x, (..., rows).
    """
    if needs_whole_weight(x, bias, functions):
        whole = dense(weight, x.dtype)
        for function in functions:
            whole = function(whole)
        return linear(x, whole, bias)
    rows, columns = weight.shape
    flat = x.reshape(-1, columns)
    whole_bytes, out_bytes = rows * columns * x.itemsize, len(flat) * rows * x.itemsize
    if whole_bytes <= (TILE_BYTES if x.device.type == "cpu" else max(TILE_BYTES, out_bytes)):
        whole = PatchedRows(weight, functions, x).dequantize_rows(0, _scratch.tile(rows, x))
        return linear(x, whole, bias)
    out = x.new_empty(*x.shape[:-1], rows)
    for part, tile in dequantized_tiles(PatchedRows(weight, functions, x), slice(0, rows), x):
        product, part_bias = out.view(-1, rows)[:, part], None if bias is None else bias[part]
        if x.device.type in _LOSES_OUT_SLICES:
            product.copy_(linear(flat, tile, part_bias))
        elif part_bias is None:
            torch.mm(flat, tile.t(), out=product)
        else:
            torch.addmm(part_bias, flat, tile.t(), out=product)
    return out
