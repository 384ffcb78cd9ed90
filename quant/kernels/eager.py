"""Dequantization and 8-bit rows with torch operations, in chunks: works for every device and type."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..native.rotation import rotate

if TYPE_CHECKING:
    from ..qtype import QuantType

# Elements to unpack at a time. On an accelerator, each operation is a launch, so chunks are larger; the temporaries
# need at most about 80 MiB.
CPU_ELEMENTS = 1 << 20
DEVICE_ELEMENTS = 1 << 22
# Elements to multiply at a time on a CPU. As float32 they stay in its cache until they are rounded or rotated.
CPU_PRODUCTS = 1 << 18

INT8_SCALE = 1 / 127
"""The scale of a row whose largest magnitude is 1."""
SMALLEST_SCALE = 1e-30
"""The scale of a row of zeros, which is kitchen's."""
INT8_DISTANCES = (1, 4, 16, 64)
"""The order of the rotation's steps: neighbors first, which a thread of a GPU holds together."""


def dequantize(qtype: QuantType, packed: Tensor, out: Tensor) -> None:
    """Dequantize at least one block.

    Args:
        packed: uint8, (..., n * type_size), of any strides and alignment.
        out: any float dtype, as many elements as `packed` stores, contiguous; written to.
    """
    elements, products = (CPU_ELEMENTS, CPU_PRODUCTS) if packed.is_cpu else (DEVICE_ELEMENTS, DEVICE_ELEMENTS)
    step, few = max(1, elements // qtype.block_size), max(1, products // qtype.block_size)
    blocks, weights = packed.reshape(-1, qtype.type_size), out.view(-1, qtype.block_size)
    for source, destination in zip(torch.split(blocks, step), torch.split(weights, step), strict=True):
        for part, to in zip(qtype.unpack(source).split(few), torch.split(destination, few), strict=True):
            to.copy_(part.weights())


def int8_rows(qtype: QuantType, packed: Tensor, codes: Tensor, scales: Tensor, delta: Tensor | None = None) -> None:
    """Dequantize rows to float32, rotate them, add `delta`, and round them to 8-bit integers with one scale a row.

    The scale of a row with NaN is NaN.

    Args:
        packed: uint8, (n_rows, n_blocks * type_size), of any strides and alignment.
        codes: int8, (n_rows, columns), with columns that are a multiple of 256; written to.
        scales: float32, (n_rows, 1); written to.
        delta: what to add to the rotated rows, of any float dtype, like `codes`.

    Source: comfy-kitchen 0.2.26 backends/eager/quantization.py quantize_int8_convrot_weight, which rotates in the dtype
    of the weight. All bits are equal on all devices, so a quotient is rounded once.
    """
    n_rows, columns = codes.shape
    elements = CPU_PRODUCTS if packed.is_cpu else DEVICE_ELEMENTS
    for start in range(0, n_rows, step := max(1, elements // columns)):
        part = slice(start, start + step)
        weights = qtype.dequantize_blocks(packed[part].reshape(-1, qtype.type_size)).view(-1, columns)
        rotated = rotate(weights, INT8_DISTANCES)
        if delta is not None:
            rotated += delta[part]
        largest = torch.linalg.vector_norm(rotated, torch.inf, 1, keepdim=True)
        scales[part] = largest.mul_(INT8_SCALE).clamp_(min=SMALLEST_SCALE)
        codes[part] = rotated.mul_(scales[part].reciprocal()).round_()
