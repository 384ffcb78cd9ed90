"""OptionalPath: a faster implementation that a machine may not have, or that may fail there."""

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
"""Convert the first tensor into the second; return False, having done nothing, to leave it to torch operations."""


class _Module(Protocol):
    dequantize: Convert
    """Takes uint8 (n * type_size) and writes (n * block_size), n > 0; both are contiguous from a 16-byte boundary."""


class OptionalPath:
    """A module of this package with `dequantize`, and perhaps `quantize`, which is imported at its first use.

    It is not used where the library behind it is not installed. If it fails for a type, a warning says so, and torch
    operations convert that type from then on.
    """

    def __init__(self, module: str, title: str, library: str = "") -> None:
        self._name, self.library, self.title = module, library, title
        self._module: _Module | None = None
        self.missing = ""
        """Why the library cannot be used here; empty if it can, or was not needed yet."""
        self.lost: set[str] = set()
        """Names of the types for which it failed."""

    def dequantize(self, qtype: QuantType, packed: Tensor, out: Tensor) -> bool:
        """Dequantize blocks, and return whether that was done.

        Args:
            packed: uint8, n * type_size elements, n > 0.
            out: any float dtype, n * block_size elements, contiguous; written to.
        """
        return self._attempt("dequantize", qtype, _aligned(packed), out)

    def quantize(self, qtype: QuantType, blocks: Tensor, packed: Tensor) -> bool:
        """Quantize blocks as `QuantType.fast` does, and return whether that was done.

        Args:
            blocks: (n, block_size) of any float dtype.
            packed: uint8 (n, type_size), contiguous; written to.
        """
        return self._attempt("quantize", qtype, blocks, packed)

    def quantize_rows(self, qtype: QuantType, rows: Tensor, packed: Tensor, importance: Tensor | None) -> bool:
        """Quantize rows as ggml does with importance, and return whether that was done.

        Args:
            rows: float32 (rows, n), contiguous.
            packed: uint8 (rows, bytes per row), contiguous; written to.
            importance: float32 (n,), or None.
        """
        return self._attempt("quantize_rows", qtype, rows, packed, importance)

    def int8_rows(
        self, qtype: QuantType, packed: Tensor, codes: Tensor, scales: Tensor, delta: Tensor | None = None
    ) -> bool:
        """Rotate and round rows as `eager.int8_rows` does, and return whether that was done.

        Args:
            packed: uint8, (n_rows, n_blocks * type_size).
            codes: int8, (n_rows, columns), contiguous, with columns that are a multiple of 256; written to.
            scales: float32, (n_rows, 1), contiguous; written to.
            delta: what to add to the rotated rows, of any float dtype, like `codes`, contiguous; or None.
        """
        return self._attempt("int8_rows", qtype, _aligned(packed), codes, scales, delta)

    def _attempt(self, operation: str, qtype: QuantType, *arguments: Tensor | None) -> bool:
        if self.missing or qtype.name in self.lost:
            return False
        try:
            module = self._module or self._import()
            if module is None:
                return False
            convert: Callable[..., bool] = getattr(module, operation)
            return convert(qtype, *arguments)
        except torch.OutOfMemoryError:
            raise
        # A compiler, a driver or another version of a library may raise anything. Torch operations give the same bits.
        except Exception as error:  # noqa: BLE001
            self.lost.add(qtype.name)
            logger.warning(
                "%s failed for %s (%s); WanQuant uses slower torch operations for it",
                self.title,
                qtype.name,
                _reason(error),
            )
            return False

    def _import(self) -> _Module | None:
        try:
            self._module = cast("_Module", import_module(f".{self._name}", __package__))
        except (ImportError, OSError) as error:
            self.missing = _reason(error)
            logger.info("%s cannot be used here (%s); WanQuant uses torch operations instead", self.title, self.missing)
        return self._module


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _aligned(source: Tensor) -> Tensor:
    source = source.contiguous()
    return source.clone() if source.data_ptr() % 16 else source


FUSED = OptionalPath("triton_kernel", "Fused Triton dequantization", "Triton")
FUSED_INT8 = OptionalPath("triton_int8", "Fused Triton rounding to 8 bits", "Triton")
GGML = OptionalPath("libggml", "ggml's C code", "libggml")
