"""Dequantization with torch operations, in chunks of blocks: works for every device and type."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..qtype import QuantType

# Elements to dequantize at a time. On a CPU, the temporaries stay in its cache. On an accelerator, each operation is a
# launch, so chunks are larger; the temporaries need at most about 80 MiB.
CPU_ELEMENTS = 1 << 19
DEVICE_ELEMENTS = 1 << 22


def dequantize(qtype: QuantType, packed: Tensor, out: Tensor) -> None:
    """Dequantize at least one block.

    Args:
        packed: uint8, (..., n * type_size), of any strides and alignment.
        out: any float dtype, as many elements as `packed` stores, contiguous; written to.
    """
    step = max(1, (CPU_ELEMENTS if packed.device.type == "cpu" else DEVICE_ELEMENTS) // qtype.block_size)
    blocks, weights = packed.reshape(-1, qtype.type_size), out.view(-1, qtype.block_size)
    for source, destination in zip(torch.split(blocks, step), torch.split(weights, step), strict=True):
        destination.copy_(qtype.dequantize_blocks(source))
