"""What a model asks of main memory, said before it is loaded."""

from __future__ import annotations

import logging

import comfy.model_management
import torch

from ...quant import QuantError
from ...quant.gguf.header import Header
from ...quant.units import GIB

logger = logging.getLogger(__name__)


def check_memory(header: Header, decoded: int) -> None:
    """Refuse a file that does not fit, and warn of one that will be read from disk again at every step.

    Args:
        decoded: bytes of memory of its own that loading takes; all else is mapped, and the system can take it back.

    Raises:
        QuantError: less main memory is free than that.
    """
    free = comfy.model_management.get_free_memory(torch.device("cpu"))
    if decoded > free:
        raise QuantError(
            f"{header.path}: loading takes {decoded / GIB:.2f} GiB, and {free / GIB:.2f} GiB of main memory are free;"
            " close other programs, or choose a file that this pack converted, which needs nothing decoded"
        )
    mapped = sum(record.nbytes for record in header.tensors.values())
    if mapped > free - decoded:
        logger.warning(
            "%s: %.2f GiB of weights and %.2f GiB of free main memory, so they are read from disk again at every step;"
            " close other programs, or choose a smaller recipe",
            header.path,
            mapped / GIB,
            (free - decoded) / GIB,
        )
