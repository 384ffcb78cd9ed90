"""OptionalPath: a faster implementation that may be missing on a machine, or fail there."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..qtype import QuantType

logger = logging.getLogger(__name__)

Convert = Callable[["QuantType", Tensor, Tensor], bool]
"""Convert the first tensor into the second, and return whether that was done; False leaves it to torch operations."""


class _Module(Protocol):
    dequantize: Convert
    """At least one block, (n * type_size) uint8 -> (n * block_size), both contiguous from a 16-byte boundary."""


class OptionalPath:
    """A module of this package with `dequantize`, and perhaps `quantize`, imported at its first use.

    Where its package is not installed, nothing uses it. If it fails for one type, a warning says so, and only that type
    is left to the torch operations from then on.
    """

    def __init__(self, module: str, title: str) -> None:
        self._name, self._title = module, title
        self._module: _Module | None = None
        self._missing = False
        self.lost: set[str] = set()
        """Names of the types for which it failed."""

    def dequantize(self, qtype: QuantType, packed: Tensor, out: Tensor) -> bool:
        """Dequantize `packed` into `out`, contiguous, and return whether that was done."""
        return self._attempt("dequantize", qtype, _aligned(packed), out)

    def quantize(self, qtype: QuantType, blocks: Tensor, packed: Tensor) -> bool:
        """Encode `blocks` into `packed` as `QuantType.fast` does, and return whether that was done."""
        return self._attempt("quantize", qtype, blocks, packed)

    def _attempt(self, operation: str, qtype: QuantType, source: Tensor, out: Tensor) -> bool:
        if self._missing or qtype.name in self.lost:
            return False
        try:
            module = self._module or self._import()
            if module is None:
                return False
            convert: Convert = getattr(module, operation)
            return convert(qtype, source, out)
        except torch.OutOfMemoryError:
            raise
        # A compiler, a driver or another version of a package may raise anything; torch operations give the same bits.
        except Exception as error:  # noqa: BLE001
            self.lost.add(qtype.name)
            logger.warning("WanQuant runs %s without %s (%s)", qtype.name, self._title, _reason(error))
            return False

    def _import(self) -> _Module | None:
        try:
            self._module = cast("_Module", import_module(f".{self._name}", __package__))
        except (ImportError, OSError) as error:
            self._missing = True
            logger.info("WanQuant runs without %s (%s)", self._title, _reason(error))
        return self._module


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _aligned(source: Tensor) -> Tensor:
    source = source.contiguous()
    return source.clone() if source.data_ptr() % 16 else source


FUSED = OptionalPath("triton_kernel", "fused kernels")
GGML = OptionalPath("libggml", "ggml's C code")
