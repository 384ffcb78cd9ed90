"""Matrix products with packed weights in 8-bit integers: optional, faster on most GPUs, not bit-exact."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor

from ...quant import QuantError
from ...quant.native.rotation import GROUP
from ...quant.torch_op import int8_rows_into
from .. import host
from .linear import GGUFOps
from .matmul import WeightFunction, dequantized_tiles, needs_whole_weight, packed_linear

_PLAIN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

MIN_TOKENS = 1024
"""With fewer tokens, quantizing the weight to 8-bit integers costs more time than the product saves."""


def int8_linear(
    x: Tensor, weight: QuantizedTensor, bias: Tensor | None, functions: Sequence[WeightFunction] = ()
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

    Returns:
        The dtype of x, (..., rows).

    Source: comfy-kitchen 0.2.26, TensorWiseINT8Layout, `convrot`.
    """
    columns = weight.shape[1]
    if columns % GROUP or x.numel() < MIN_TOKENS * columns or needs_whole_weight(x, bias, functions):
        return packed_linear(x, weight, bias, functions)
    codes, scales = int8_rows(weight, functions, x)
    return host.int8_linear(x, codes, scales, bias, GROUP)


def int8_rows(weight: QuantizedTensor, functions: Sequence[WeightFunction], like: Tensor) -> tuple[Tensor, Tensor]:
    """Return a packed weight after `functions` as rotated 8-bit integers.

    Without functions, the weights are rounded to 8 bits only. Functions get tiles in the dtype of `like`, as always.

    Args:
        weight: packed, (rows, columns).
        functions: applied to the dequantized weight in turn.
        like: a tensor of the compute dtype and on the device of the weight.

    Returns:
        Codes, int8, (rows, columns), and scales, float32, (rows, 1).
    """
    codes = like.new_empty(weight.shape, dtype=torch.int8)
    scales = like.new_empty(len(codes), 1, dtype=torch.float32)
    if functions:
        for part, tile in dequantized_tiles(weight, functions, like):
            int8_rows_into(tile.contiguous().view(torch.uint8), _PLAIN[tile.dtype], codes[part], scales[part])
    else:
        int8_rows_into(host.packed_bytes(weight), weight.params.qtype, codes, scales)
    return codes, scales


class Int8Ops(GGUFOps):
    """The host's `operations` for a model that computes large products in 8-bit integers."""

    class Linear(GGUFOps.Linear):
        multiply = staticmethod(int8_linear)


def int8_ops() -> type[GGUFOps]:
    """Return the operations for products in 8-bit integers.

    Raises:
        QuantError: the host cannot multiply 8-bit integers.
    """
    if not host.has_int8():
        raise QuantError("int8: this ComfyUI has no 8-bit products; update it to 0.27 or newer, or turn int8 off")
    return Int8Ops
