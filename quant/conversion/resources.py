"""The check for disk space and main memory before the first byte of a conversion is written."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ..errors import QuantError
from ..files.disk_space import check_space
from ..files.tensor_writer import TensorWriter
from ..native.layer_type import LayerType
from ..sources.checkpoint import Checkpoint
from ..statistics.calibration import Calibration
from ..units import GIB

# Slices in flight and the temporaries of the search; `bench convert` measures less than this.
_ENCODING_BYTES = 1 << 28
# The same with a calibration, whose moments and slices are larger: see `bench convert --calibrate ffn.2`.
_ROUNDING_BYTES = 7 << 27
# A weight in a native format is held whole, as is the next one. While it is rounded, there are also its codes. Later,
# there are its decoded values in float32 and up to four copies of the codes.
_CODES_BYTES_A_WEIGHT, _DECODED_BYTES_A_WEIGHT = 1, 8


def check_resources(
    checkpoint: Checkpoint, writers: Iterable[TensorWriter[Any]], importance: Mapping[str, Tensor] | None = None
) -> None:
    """Refuse a conversion that would run out of disk space or main memory.

    Args:
        importance: what is known of the inputs of layers, floating point (in_features,). With a calibration, weights
            are rounded for the outputs of their layers, and with any importance those in native formats.

    Raises:
        QuantError: the files need more disk space than is free, or encoding needs more main memory.
    """
    files = list(writers)
    check_space({file.path: file.nbytes for file in files})
    specs = (spec for file in files for spec in file.tensors)
    needed, free = memory_needed(checkpoint, specs, importance), free_memory()
    if needed > free:
        raise QuantError(
            f"{checkpoint.path}: converting needs {needed / GIB:.2f} GiB of main memory, but only"
            f" {free / GIB:.2f} GiB are free; close other programs, or unload models"
        )


def memory_needed(checkpoint: Checkpoint, specs: Iterable[Any], importance: Mapping[str, Tensor] | None = None) -> int:
    """Return the most main memory in bytes that encoding these tensors, each with `qtype` and `shape`, needs.

    Args:
        importance: as for `check_resources`.
    """
    whole = max((math.prod(spec.shape) for spec in specs if isinstance(spec.qtype, LayerType)), default=0)
    held = 2 * max((tensor.dtype.itemsize for tensor in checkpoint.tensors.values()), default=0)
    encoding = _ENCODING_BYTES + (held + _DECODED_BYTES_A_WEIGHT) * whole
    if isinstance(importance, Calibration) or (importance and whole):
        encoding = max(encoding, _ROUNDING_BYTES + (held + _CODES_BYTES_A_WEIGHT) * whole)
    return encoding + checkpoint.held_bytes


def free_memory() -> float:
    """Return the available main memory in bytes; infinite without psutil, which comes with ComfyUI."""
    try:
        psutil = importlib.import_module("psutil")
    except ImportError:
        return math.inf
    return float(psutil.virtual_memory().available)
