"""The check for disk space and main memory before the first byte of a conversion is written."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from typing import Any

from ..errors import QuantError
from ..files.disk_space import check_space
from ..files.tensor_writer import TensorWriter
from ..native.layer_type import LayerType
from ..sources.checkpoint import Checkpoint
from ..units import GIB

# Slices in flight and the temporaries of the search with a calibration; `bench convert` measures less than this.
_ENCODING_BYTES = 1 << 28
# A weight in a native format is encoded whole: its values, the next weight's, the decoded ones and temporaries.
_WHOLE_BYTES_A_WEIGHT = 12


def check_resources(checkpoint: Checkpoint, writers: Iterable[TensorWriter[Any]]) -> None:
    """Refuse a conversion that would run out of disk space or main memory.

    Raises:
        QuantError: the files need more disk space than is free, or encoding needs more main memory.
    """
    files = list(writers)
    check_space({file.path: file.nbytes for file in files})
    needed, free = memory_needed(checkpoint, (spec for file in files for spec in file.tensors)), free_memory()
    if needed > free:
        raise QuantError(
            f"{checkpoint.path}: converting needs {needed / GIB:.2f} GiB of main memory, but only"
            f" {free / GIB:.2f} GiB are free; close other programs, or unload models"
        )


def memory_needed(checkpoint: Checkpoint, specs: Iterable[Any]) -> int:
    """Return the most main memory in bytes that encoding these tensors, each with `qtype` and `shape`, needs."""
    whole = (math.prod(spec.shape) for spec in specs if isinstance(spec.qtype, LayerType))
    return _ENCODING_BYTES + _WHOLE_BYTES_A_WEIGHT * max(whole, default=0) + checkpoint.held_bytes


def free_memory() -> float:
    """Return the available main memory in bytes; infinite without psutil, which comes with ComfyUI."""
    try:
        psutil = importlib.import_module("psutil")
    except ImportError:
        return math.inf
    return float(psutil.virtual_memory().available)
