"""The product with a packed weight in 8-bit integers, opt-in: faster on most GPUs, and not bit-comparable."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor

from ...quant import QuantError
from .. import host
from .linear import GGUFOps
from .matmul import WeightFunction, decoded_tiles, needs_whole, packed_linear

GROUP = 256
"""Neighbouring columns that a Hadamard matrix mixes, so that an outlier among them does not set the scale alone."""

MIN_TOKENS = 1024
"""With fewer, what it takes to make 8-bit integers of the weight exceeds what the product saves."""


def int8_linear(
    x: Tensor, weight: QuantizedTensor, bias: Tensor | None, functions: Sequence[WeightFunction] = ()
) -> Tensor:
    """`packed_linear` with a scale for each token and each row of the weight, both rotated by Hadamard matrices.

    Takes a byte for each weight, and one tile. Source: comfy-kitchen 0.2.26, TensorWiseINT8Layout, `convrot`.
    """
    rows, columns = weight.shape
    if columns % GROUP or x.numel() < MIN_TOKENS * columns or needs_whole(x, bias, functions):
        return packed_linear(x, weight, bias, functions)
    codes, scales = x.new_empty(rows, columns, dtype=torch.int8), x.new_empty(rows, 1, dtype=torch.float32)
    for part, tile in decoded_tiles(weight, functions, x):
        codes[part], scales[part] = host.quantize_rows(tile)
    return host.int8_linear(x, codes, scales, bias, GROUP)


class Int8Ops(GGUFOps):
    """The host's `operations` for a model whose large products are in 8-bit integers."""

    class Linear(GGUFOps.Linear):
        multiply = staticmethod(int8_linear)


def int8_ops() -> type[GGUFOps]:
    """Raises QuantError where the host cannot multiply in 8-bit integers."""
    if not host.has_int8():
        raise QuantError("int8: this ComfyUI has no INT8 arithmetic; update it to 0.27 or newer, or turn int8 off")
    return Int8Ops
