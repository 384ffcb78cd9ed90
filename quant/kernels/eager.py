"""Torch operations, block chunk by block chunk: any device, every type, the reference of all other paths."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..qtype import QuantType

# Weights to decode at a time. On a CPU the temporaries stay in its cache; elsewhere they are bounded at about 80 MiB,
# as each operation is a launch.
CPU_WEIGHTS = 1 << 19
DEVICE_WEIGHTS = 1 << 22


def dequantize(qtype: QuantType, packed: Tensor, out: Tensor) -> None:
    """Decode at least one block, of any strides and alignment, into `out`, contiguous."""
    step = max(1, (CPU_WEIGHTS if packed.device.type == "cpu" else DEVICE_WEIGHTS) // qtype.block_size)
    blocks, weights = packed.reshape(-1, qtype.type_size), out.view(-1, qtype.block_size)
    for source, destination in zip(torch.split(blocks, step), torch.split(weights, step), strict=True):
        destination.copy_(qtype.dequantize_blocks(source))
