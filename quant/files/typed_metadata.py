"""TypedMetadata: GGUF metadata whose values are checked for their type and size when they are used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import QuantError

_MAX_BYTES = 1 << 26


class TypedMetadata:
    """Metadata of a file that may be hostile; a key that is missing gives the default.

    Args:
        where: the file or its part, for messages.

    Raises:
        QuantError: in every method, a value of another type or size.
    """

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self._metadata, self._where = metadata, where

    def text(self, key: str, default: str) -> str:
        """Return a string."""
        value = self._metadata.get(key, default)
        if isinstance(value, str):
            return value
        raise self._error(key, value, "a string")

    def flag(self, key: str, *, default: bool) -> bool:
        """Return a boolean; 0 and 1 count as such."""
        value = self._metadata.get(key, default)
        if isinstance(value, int) and value in (0, 1):
            return bool(value)
        raise self._error(key, value, "a boolean")

    def integer(self, key: str, default: int) -> int:
        """Return an integer of 64 bits; some writers store it as a float."""
        value = self._metadata.get(key, default)
        if isinstance(value, (int, float)) and abs(value) < 1 << 64 and float(value).is_integer():
            return int(value)
        raise self._error(key, value, "an integer")

    def texts(self, key: str) -> tuple[str, ...]:
        """Return an array of strings, empty by default."""
        value = self._metadata.get(key, ())
        if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
            texts = tuple(value)
            if all(isinstance(text, str) for text in texts):
                return texts
        raise self._error(key, value, "an array of strings")

    def numbers(self, key: str, dtype: type[np.generic]) -> NDArray[Any]:
        """Return an array of finite numbers as `dtype`, (n,), empty by default; integers are not rounded."""
        value = self._metadata.get(key, np.empty(0, dtype))
        if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "iufb":
            with np.errstate(all="ignore"):
                numbers = value.astype(dtype)
            if np.isfinite(numbers).all() and (numbers.dtype.kind == "f" or np.array_equal(numbers, value)):
                return numbers
        raise self._error(key, value, f"an array of finite numbers of {np.dtype(dtype)}")

    def raw(self, key: str) -> bytes:
        """Return an array of bytes, empty by default."""
        value = self._metadata.get(key, b"")
        if isinstance(value, bytes):
            return value
        if isinstance(value, np.ndarray) and value.dtype.itemsize == 1 and value.nbytes <= _MAX_BYTES:
            return value.tobytes()
        raise self._error(key, value, f"an array of at most {_MAX_BYTES} bytes")

    def _error(self, key: str, value: object, expected: str) -> QuantError:
        got = f"array of {len(value)} {value.dtype}" if isinstance(value, np.ndarray) else f"{value!r:.40}"
        return QuantError(
            f"{self._where}: {key}: {got}, expected {expected}; the file is damaged, download or convert it again"
        )
