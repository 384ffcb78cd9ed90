"""Errors of the host while it builds a model, as errors of the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ...quant import QuantError


@contextmanager
def built_by_host(path: Path) -> Iterator[None]:
    """Turn an error that a bad file causes in the host's code into a QuantError with its path.

    The host takes metadata and shapes as they are. It raises whatever its own lines raise then.
    """
    try:
        yield
    except (QuantError, torch.OutOfMemoryError):
        raise
    except (AttributeError, LookupError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise QuantError(
            f"{path}: ComfyUI cannot build a model from this file ({type(error).__name__}: {reason:.200});"
            " convert or download it again"
        ) from error
