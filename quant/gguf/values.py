"""GGUF metadata values: their types, a reader that checks every length, and the functions that write them.

Source: ggml docs/gguf.md (gguf_metadata_value_type); the PyPI package gguf 0.19, constants.py GGUFValueType.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from ..errors import QuantError

MAX_HEADER_BYTES = 1 << 26
"""The most bytes that a damaged file can make us read. Real headers with 262k tokens and merges have 10 MiB."""
MAX_ITEMS = 1 << 14
"""The limit of tensors, of metadata keys and of nested arrays, since each becomes a Python object.

Wan 14B has 1,095 tensors.
"""
DAMAGED = "the file is damaged, download or convert it again"
"""The end of messages about files that no program writes on purpose."""

# The limits of all strings in arrays, and of the bytes of all names and other strings, in one file.
_MAX_STRINGS = 1 << 20
_MAX_TEXT_BYTES = 1 << 25
_MIN_STRING_BYTES = 8
_MIN_ARRAY_BYTES = 12
_MAX_NAME_BYTES = (1 << 16) - 1
_MAX_DEPTH = 4
_FIRST_READ_BYTES = 1 << 20
_U64 = struct.Struct("<Q")


class ValueType(IntEnum):
    """The value types that are not plain numbers."""

    STRING = 8
    ARRAY = 9


_NUMBERS: dict[int, np.dtype[Any]] = {
    type_id: np.dtype(name)
    for type_id, name in enumerate(("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", "", "", "<u8", "<i8", "<f8"))
    if name
}
_NUMBER_IDS = {dtype: type_id for type_id, dtype in _NUMBERS.items()}


class StringArray(Sequence[str]):
    """An array of strings that stay packed as in the file; each is decoded from UTF-8 when it is accessed.

    The first access also finds the positions of all strings.

    Raises:
        QuantError: on access to a string that is not UTF-8.
    """

    def __init__(self, packed: bytes, count: int, label: str) -> None:
        self._packed, self._count, self._label = packed, count, label

    @cached_property
    def _starts(self) -> list[int]:
        starts, position = [], 0
        for _ in range(self._count):
            starts.append(position)
            position += 8 + _U64.unpack_from(self._packed, position)[0]
        return starts

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._decode(start) for start in self._starts[index]]
        return self._decode(self._starts[index])

    def _decode(self, start: int) -> str:
        stop = start + 8 + _U64.unpack_from(self._packed, start)[0]
        return _decode_utf8(self._packed[start + 8 : stop], self._label)


MetadataValue: TypeAlias = "bool | int | float | str | NDArray[Any] | StringArray | tuple[MetadataValue, ...]"
"""A value as the reader returns it; a tuple is an array of arrays."""


class HeaderReader:
    """A reader of a file's header, which it loads in growing chunks.

    Lengths are checked against the size of the file before anything is allocated. Every method raises QuantError, with
    the path and the field, if the file does not hold what is asked for.
    """

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.size, self.position = path, size, 0
        self._file, self._data = file, b""
        self._n_nested = self._n_strings = self._n_text_bytes = 0

    def error(self, field: str, problem: str) -> QuantError:
        """Return an error that names the file and the field."""
        return QuantError(f"{self.path}: {field}: {problem}")

    def take(self, nbytes: int, field: str) -> bytes:
        """Return the next `nbytes` bytes."""
        start = self.position
        self._fill(start + nbytes, field)
        self.position += nbytes
        return self._data[start : self.position]

    def u32(self, field: str) -> int:
        return int.from_bytes(self.take(4, field), "little")

    def u64(self, field: str) -> int:
        return int.from_bytes(self.take(8, field), "little")

    def count(self, field: str, item_bytes: int, limit: int = MAX_ITEMS) -> int:
        """Read a number of items of at least `item_bytes` each, which the rest of the file must have room for."""
        count = self.u64(field)
        if count > limit or count * item_bytes > self.size - self.position:
            raise self.error(
                field,
                f"{count} items, expected at most {limit} and as many as fit into {self.size} bytes; {DAMAGED}",
            )
        return count

    def name(self, field: str) -> str:
        """Read a metadata key or the name of a tensor."""
        nbytes = self.u64(field)
        if not 0 < nbytes <= _MAX_NAME_BYTES:
            raise self.error(field, f"{nbytes} bytes long, expected 1 to {_MAX_NAME_BYTES}; {DAMAGED}")
        name = self._text(nbytes, field)
        if not name.isprintable():
            raise self.error(field, f"{name!r:.80} has unprintable characters, expected text; {DAMAGED}")
        return name

    def value(self, key: str) -> MetadataValue:
        """Read a value type and a value of that type."""
        type_id = self.u32(key)
        if type_id == ValueType.STRING:
            return self._text(self.u64(key), key)
        if type_id == ValueType.ARRAY:
            return self._array(key, depth=1)
        number: bool | int | float = self._numbers(type_id, 1, key)[0].item()
        return number

    def _text(self, nbytes: int, field: str) -> str:
        self._n_text_bytes += nbytes
        if self._n_text_bytes > _MAX_TEXT_BYTES:
            raise self.error(
                field,
                f"{self._n_text_bytes} bytes of the header are text, expected at most {_MAX_TEXT_BYTES}; {DAMAGED}",
            )
        return _decode_utf8(self.take(nbytes, field), f"{self.path}: {field}")

    def _array(self, key: str, depth: int) -> MetadataValue:
        type_id = self.u32(key)
        if type_id == ValueType.STRING:
            count = self.count(key, _MIN_STRING_BYTES, _MAX_STRINGS - self._n_strings)
            self._n_strings += count
            return StringArray(self._packed_strings(count, key), count, f"{self.path}: {key}")
        if type_id != ValueType.ARRAY:
            return self._numbers(type_id, self.u64(key), key)
        count = self.count(key, _MIN_ARRAY_BYTES)
        self._n_nested += count
        if depth == _MAX_DEPTH or self._n_nested > MAX_ITEMS:
            raise self.error(
                key, f"arrays nested deeper than {_MAX_DEPTH} levels or more than {MAX_ITEMS} of them; {DAMAGED}"
            )
        return tuple(self._array(key, depth + 1) for _ in range(count))

    def _numbers(self, type_id: int, count: int, key: str) -> NDArray[Any]:
        if type_id not in _NUMBERS:
            raise self.error(key, f"metadata value type {type_id}, expected 0 to 12; {DAMAGED}")
        dtype = _NUMBERS[type_id]
        return np.frombuffer(self.take(count * dtype.itemsize, key), dtype)

    def _packed_strings(self, count: int, key: str) -> bytes:
        # Vocabularies have 256k entries, so this loop calls nothing except the function that reads a length.
        length_at, data, start = _U64.unpack_from, self._data, self.position
        position, last = start, len(data) - 8
        for _ in range(count):
            if position > last:
                data = self._fill(position + 8, key)
                last = len(data) - 8
            position += 8 + length_at(data, position)[0]
        return self.take(position - start, key)

    def _fill(self, stop: int, field: str) -> bytes:
        if stop > self.size:
            raise self.error(
                field,
                f"ends at byte {stop}, past the end of the file ({self.size} bytes); {DAMAGED}",
            )
        if stop > MAX_HEADER_BYTES:
            raise self.error(
                field, f"ends at byte {stop} of the header, expected at most {MAX_HEADER_BYTES}; {DAMAGED}"
            )
        if stop > len(self._data):
            self._file.seek(0)
            wanted = max(stop, 2 * len(self._data), _FIRST_READ_BYTES)
            self._data = self._file.read(min(self.size, MAX_HEADER_BYTES, wanted))
            if len(self._data) < stop:
                raise self.error(field, "the file became shorter while it was read; wait until it is complete")
        return self._data


def pack_name(text: str) -> bytes:
    """Return a name, key or string value as GGUF stores it: its length and its UTF-8 bytes.

    Raises:
        QuantError: the text cannot be encoded.
    """
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        raise QuantError(
            f"{text!r}: cannot be stored as UTF-8, expected valid Unicode; change it in the source"
        ) from None
    return _U64.pack(len(encoded)) + encoded


def pack_metadata(metadata: Mapping[str, Any]) -> bytes:
    """Return the keys, value types and values as GGUF stores them, in order.

    Numpy numbers and arrays are stored with their dtype. Python's bool becomes BOOL and float becomes FLOAT32. An int
    becomes UINT32, which ggml uses for counts and file types. Bytes become an array of UINT8, and a sequence of str an
    array of STRING.

    Raises:
        QuantError: a value has any other type, or is an int that UINT32 cannot hold.
    """
    return b"".join(pack_name(key) + _pack_value(key, value) for key, value in metadata.items())


def _pack_value(key: str, value: object) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", ValueType.STRING) + pack_name(value)
    if isinstance(value, (bool, int, float, bytes, np.generic, np.ndarray)):
        return _pack_numbers(key, _as_numpy(key, value))
    if isinstance(value, Sequence) and all(isinstance(item, str) for item in value):
        head = struct.pack("<IIQ", ValueType.ARRAY, ValueType.STRING, len(value))
        return head + b"".join(map(pack_name, value))
    raise _unwritable(key, value)


def _as_numpy(key: str, value: float | bytes | NDArray[Any] | np.generic) -> NDArray[Any]:
    if isinstance(value, (np.generic, np.ndarray)):
        return np.asarray(value)
    if isinstance(value, bytes):
        return np.frombuffer(value, np.uint8)
    if isinstance(value, (bool, float)):
        return np.array(value, np.bool_ if isinstance(value, bool) else np.float32)
    if not 0 <= value < 1 << 32:
        raise QuantError(
            f"metadata {key}: {value}, expected an int from 0 to 2^32 - 1; pass a numpy number of the type to store"
        )
    return np.array(value, np.uint32)


def _pack_numbers(key: str, value: NDArray[Any]) -> bytes:
    dtype = value.dtype.newbyteorder("<")
    if dtype not in _NUMBER_IDS or value.ndim > 1:
        raise _unwritable(key, value)
    packed = value.astype(dtype).tobytes()
    if value.ndim == 0:
        return struct.pack("<I", _NUMBER_IDS[dtype]) + packed
    return struct.pack("<IIQ", ValueType.ARRAY, _NUMBER_IDS[dtype], value.size) + packed


def _unwritable(key: str, value: object) -> QuantError:
    kind = f"{type(value).__name__} {getattr(value, 'dtype', '')}".strip()
    return QuantError(
        f"metadata {key}: a {kind}, expected bool, int, float, str, bytes, a list of str or a numpy array of numbers;"
        " convert the value"
    )


def _decode_utf8(encoded: bytes, label: str) -> str:
    try:
        return encoded.decode()
    except UnicodeDecodeError as error:
        raise QuantError(f"{label}: not valid UTF-8 at byte {error.start}; {DAMAGED}") from None
