"""OptionalPath: a quicker way to decode that may be missing or not work on a machine."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable, Container
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..qtype import QuantType

logger = logging.getLogger(__name__)

# Beside a missing package or compiler: one of another version or language (ValueError is also what a driver says of
# memory it does not know, and a UnicodeError).
_FAILURES = (
    *(ImportError, OSError, RuntimeError, subprocess.SubprocessError),
    *(AssertionError, AttributeError, LookupError, TypeError, ValueError),
)


class _Module(Protocol):
    FORMATS: Container[str]
    """Names of the types it decodes."""
    dequantize: Callable[[QuantType, Tensor, Tensor], None]
    """Decodes at least one block into the second tensor, both contiguous from a 16-byte boundary."""


class OptionalPath:
    """A module of this package with FORMATS and `dequantize`, imported at its first use.

    Where that or a decoding fails (no such package, no compiler), the log says so once and the path is not tried again.
    """

    def __init__(self, module: str, title: str) -> None:
        self._name, self._title = module, title
        self._module: _Module | None = None
        self._lost = False

    def dequantize(self, qtype: QuantType, packed: Tensor, out: Tensor) -> bool:
        """Whether this path could do it, and has."""
        if self._lost:
            return False
        try:
            self._module = self._module or cast("_Module", import_module(f".{self._name}", __package__))
            if qtype.name not in self._module.FORMATS:
                return False
            self._module.dequantize(qtype, _aligned(packed), out)
            return True
        except torch.OutOfMemoryError:
            raise
        except _FAILURES as error:
            self._lost = True
            reason = str(error).partition("\n")[0] or type(error).__name__
            logger.info("WanQuant decodes without %s (%s)", self._title, reason)
            return False


def _aligned(packed: Tensor) -> Tensor:
    packed = packed.contiguous()
    return packed.clone() if packed.data_ptr() % 16 else packed
