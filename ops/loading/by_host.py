"""Errors of the host while it builds a model, as errors of the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ...quant import QuantError


@contextmanager
def built_by_host(path: Path, what: str = "build a model from this file") -> Iterator[None]:
    """Turn an error that a bad file causes in the host's code into a QuantError with its path.

    Args:
        path: the path of the file.
        what: what the host does with it.

    The host takes metadata and shapes as they are. It raises whatever its own lines raise then.
    """
    try:
        yield
    except (QuantError, torch.OutOfMemoryError):
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise QuantError(
            f"{path}: ComfyUI cannot {what} ({type(error).__name__}: {reason:.200}); convert or download it again"
        ) from error
