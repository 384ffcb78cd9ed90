"""Matrix products with packed weights in 8-bit integers: optional, faster on most GPUs, not bit-exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor

from ...quant import QuantError
from ...quant.native.rotation import GROUP, rotate_as_kitchen
from ...quant.torch_op import int8_rows_into
from .. import host
from .linear import GGUFOps
from .matmul import (
    HeldProduct,
    PatchedRows,
    WeightFunction,
    dequantized_tiles,
    hold_dense,
    needs_whole_weight,
    packed_linear,
)

RowMaker = Callable[[PatchedRows, slice, Tensor], tuple[Tensor, Tensor]]
"""A function that makes 8-bit rows as `patched_int8_rows` does, or has kept them."""

_PLAIN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

CHANGE_BYTES = 16 << 20
"""The largest size of the product of a LoRA's factors for some rows. The cache of a fast GPU holds it."""

MIN_TOKENS = 1024
"""With fewer tokens, products are exact in `Int8Ops`."""

WORTHWHILE_TOKENS = 8192
"""With fewer tokens, making the 8-bit rows costs more time than the product saves, and products are exact in `AutoOps`.

Measured on an H100: at 8190 tokens both take the same time (bench/results/gpu-linear-h100.json).
"""


def patched_int8_rows(patched: PatchedRows, rows: slice, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return some rows of `int8_rows`: codes, int8, (rows, columns), and scales, float32, (rows, 1).

    Args:
        rows: as for `dequantized_tiles`.
        like: a tensor of the compute dtype and on the device of the weight.
    """
    codes = like.new_empty(rows.stop - rows.start, patched.shape[1], dtype=torch.int8)
    scales = like.new_empty(len(codes), 1, dtype=torch.float32)
    write_int8_rows(patched, rows, like, codes, scales)
    return codes, scales


def write_int8_rows(patched: PatchedRows, rows: slice, like: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Write the rows of `patched_int8_rows` into existing tensors.

    LoRAs are added to rotated rows, since rotating their factors rotates their product: no dequantized row is stored.

    Args:
        rows: as for `dequantized_tiles`.
        like: a tensor of the compute dtype and on the device of the weight.
        codes: int8, (rows, columns), contiguous; written to.
        scales: float32, (rows, 1), contiguous; written to.
    """
    if factors := patched.factors:
        blocks, up, down = patched.packed[rows], factors[0][rows], rotate_as_kitchen(factors[1])
        step = max(16, CHANGE_BYTES // (down.shape[1] * down.itemsize) // 16 * 16)
        for start in range(0, len(codes), step):
            part = slice(start, start + step)
            int8_rows_into(blocks[part], patched.qtype, codes[part], scales[part], up[part] @ down)
    elif patched.is_patched:
        for part, tile in dequantized_tiles(patched, rows, like):
            int8_rows_into(tile.contiguous().view(torch.uint8), _PLAIN[tile.dtype], codes[part], scales[part])
    else:
        int8_rows_into(patched.packed[rows], patched.qtype, codes, scales)


def int8_linear(
    x: Tensor,
    weight: QuantizedTensor,
    bias: Tensor | None,
    functions: Sequence[WeightFunction] = (),
    *,
    least_tokens: int = MIN_TOKENS,
    make: RowMaker = patched_int8_rows,
) -> Tensor:
    """Return the product of `packed_linear`, computed in 8-bit integers.

    Each token and each row of the weight has a scale, and both are rotated by Hadamard matrices. Besides the output,
    this needs memory for one tile and for one byte per element of the weight. Small products are left to
    `packed_linear`.

    Args:
        x: floating point, (..., columns).
        weight: packed, (rows, columns).
        bias: the dtype of x, (rows,).
        functions: applied to the dequantized weight in turn.
        least_tokens: with fewer, the product is exact.
        make: what makes the rows of the weight.

    Returns:
        The dtype of x, (..., rows).

    Source: comfy-kitchen 0.2.26, TensorWiseINT8Layout, `convrot`.
    """
    rows, columns = weight.shape
    tokens = x.numel() // max(1, columns)
    if columns % GROUP or tokens < least_tokens or needs_whole_weight(x, bias, functions):
        return packed_linear(x, weight, bias, functions)
    patched = PatchedRows(weight, functions, x)
    return hold_int8(patched, slice(0, rows), x, tokens, least_tokens=least_tokens, make=make)(x, bias)


def hold_int8(
    patched: PatchedRows,
    rows: slice,
    like: Tensor,
    tokens: int,
    *,
    least_tokens: int = MIN_TOKENS,
    make: RowMaker = patched_int8_rows,
) -> HeldProduct:
    """Quantize rows of a packed weight to 8-bit integers once, for products with many chunks of tokens.

    Args:
        rows: as for `dequantized_tiles`.
        like: floating point, (..., channels), of the dtype and on the device of the chunks.
        tokens: of all chunks together.
        least_tokens: with fewer, the products are exact.
        make: what makes the rows.
    """
    if patched.shape[1] % GROUP or tokens < least_tokens:
        return hold_dense(patched, rows, like, tokens)
    codes, scales = make(patched, rows, like)
    return lambda x, bias: host.int8_linear(x, codes, scales, bias, GROUP)


def int8_rows(weight: QuantizedTensor, functions: Sequence[WeightFunction], like: Tensor) -> tuple[Tensor, Tensor]:
    """Return a packed weight after `functions` as rotated 8-bit integers.

    Without functions, and with LoRAs, the weights are rounded to 8 bits only. Other functions get tiles in the dtype of
    `like`, as always.

    Args:
        weight: packed, (rows, columns).
        functions: applied to the dequantized weight in turn.
        like: a tensor of the compute dtype and on the device of the weight.

    Returns:
        Codes, int8, (rows, columns), and scales, float32, (rows, 1).
    """
    return patched_int8_rows(PatchedRows(weight, functions, like), slice(0, len(weight)), like)


class Int8Ops(GGUFOps):
    """The host's `operations` for a model that computes large products in 8-bit integers."""

    class Linear(GGUFOps.Linear):
        least_tokens = MIN_TOKENS
        """The number of tokens below which all products are exact."""
        multiply = staticmethod(int8_linear)
        hold = staticmethod(hold_int8)


def hold_where_faster(
    patched: PatchedRows,
    rows: slice,
    like: Tensor,
    tokens: int,
    *,
    least_tokens: int = WORTHWHILE_TOKENS,
    make: RowMaker = patched_int8_rows,
) -> HeldProduct:
    """Hold rows as `hold_int8` does, with exact products where 8-bit ones would be slower.

    Each product quantizes its input anew. Of a few rows it saves less than that costs.

    Args:
        rows: as for `dequantized_tiles`.
        like: floating point, (..., channels), of the dtype and on the device of the chunks.
        tokens: of all chunks together.
        least_tokens: for all rows of the weight; the fewer rows, the more tokens are needed.
        make: what makes the rows.
    """
    parts = patched.shape[0] // max(1, rows.stop - rows.start)
    return hold_int8(patched, rows, like, tokens, least_tokens=least_tokens * max(1, parts), make=make)


class AutoOps(GGUFOps):
    """The host's `operations` for a model that computes products in 8-bit integers where these are faster."""

    class Linear(Int8Ops.Linear):
        least_tokens = WORTHWHILE_TOKENS
        multiply = staticmethod(partial(int8_linear, least_tokens=WORTHWHILE_TOKENS))
        hold = staticmethod(hold_where_faster)


def int8_ops() -> type[GGUFOps]:
    """Return the operations for products in 8-bit integers.

    Raises:
        QuantError: the host cannot multiply 8-bit integers.
    """
    if not host.has_int8():
        raise QuantError("int8: this ComfyUI has no 8-bit products; update it to 0.27 or newer, or turn int8 off")
    return Int8Ops
