"""Whether the disk and main memory hold a conversion, said before its first byte is written."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable

from ..errors import QuantError
from ..files.disk_space import check_space
from ..gguf.writer import GGUFWriter
from ..sources.checkpoint import Checkpoint
from ..units import GIB

# Slices on their way and the search for their least error, with a calibration; `bench convert` measures less.
_ENCODING_BYTES = 1 << 28


def check_resources(checkpoint: Checkpoint, writers: Iterable[GGUFWriter]) -> None:
    """Refuses a conversion that would run out of disk or of main memory.

    Raises:
        QuantError: less is free than the files and the weights at hand take.
    """
    check_space({writer.path: writer.nbytes for writer in writers})
    needed, free = _ENCODING_BYTES + checkpoint.held_bytes, _free_memory()
    if needed > free:
        raise QuantError(
            f"{checkpoint.path}: converting takes {needed / GIB:.2f} GiB, and {free / GIB:.2f} GiB of main memory are"
            " free; close other programs, or unload models"
        )


def _free_memory() -> float:
    """Bytes that programs can get; infinite where psutil, which comes with ComfyUI, is missing."""
    try:
        psutil = importlib.import_module("psutil")
    except ImportError:
        return math.inf
    return float(psutil.virtual_memory().available)
