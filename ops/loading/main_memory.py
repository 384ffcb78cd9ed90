"""Checks before loading whether a model fits in main memory."""

from __future__ import annotations

import comfy.model_management
import torch

from ...quant import QuantError
from ...quant.errors import PrintableLog
from ...quant.gguf.header import Header
from ...quant.units import GIB

logger = PrintableLog(__name__)


def check_memory(header: Header, dequantized: int) -> None:
    """Refuse a file that does not fit in main memory, and warn of one that must be read from disk at every step.

    Args:
        header: the header of the file.
        dequantized: bytes that loading allocates; everything else is mapped, and the system can drop it again.

    Raises:
        QuantError: less main memory is free than loading allocates.
    """
    free = comfy.model_management.get_free_memory(torch.device("cpu"))
    if dequantized > free:
        raise QuantError(
            f"{header.path}: loading needs {dequantized / GIB:.2f} GiB of main memory, {free / GIB:.2f} GiB are free;"
            " close other programs, or choose a file that this pack converted, which needs much less"
        )
    mapped = sum(record.nbytes for record in header.tensors.values())
    if mapped > free - dequantized:
        logger.warning(
            "%s: the weights need %.2f GiB, but %.2f GiB of main memory are free, so every step reads them from disk;"
            " close other programs, or choose a file made with a smaller recipe",
            header.path,
            mapped / GIB,
            (free - dequantized) / GIB,
        )
