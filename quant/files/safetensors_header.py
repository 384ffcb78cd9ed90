"""The header of a safetensors file, read with checks of every number in it."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import NamedTuple

from ..errors import QuantError
from .lookalikes import HEAD_BYTES, lookalike
from .regular_file import open_regular
from .strict_json import MAX_VALUES, count_values, parse_json

MAX_HEADER_BYTES = 16 << 20
"""Far above real headers: Wan 14B has 100 KiB. The format allows 100 MB, which would need gigabytes to parse."""
MAX_ITEMS = 1 << 14
"""The limit of tensors and of metadata keys; Wan 14B has 1,095 tensors."""

_DAMAGED = "the file is cut off, damaged or not safetensors, download or save it again"

_MAX_SIZE, _MAX_DIMS = 1 << 63, 64
_ITEM_BYTES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
    **{"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1},
}


class TensorEntry(NamedTuple):
    """A tensor as a header describes it; `begin` and `end` are offsets in bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_safetensors_header(path: Path) -> tuple[dict[str, str], list[TensorEntry]]:
    """Return the `__metadata__` of a file, and its tensors in the order of their data.

    Raises:
        QuantError: the header is cut off, is not JSON or contradicts itself or the size of the file.

    Source: "Format" of https://github.com/huggingface/safetensors, README.md
    """
    with open_regular(path) as file:
        file_bytes = os.fstat(file.fileno()).st_size
        start = file.read(8)
        if start.startswith(b"GGUF"):
            raise QuantError(f"{path}: a GGUF file, expected safetensors; choose another file")
        header_bytes = int.from_bytes(start, "little")
        if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, file_bytes - 8):
            kind = lookalike(start + file.read(HEAD_BYTES))
            if kind is not None:
                raise QuantError(f"{path}: expected safetensors, got {kind}")
            raise QuantError(
                f"{path}: header length {header_bytes} in a file of {file_bytes} bytes, expected at most"
                f" {min(MAX_HEADER_BYTES, max(file_bytes - 8, 0))}; {_DAMAGED}"
            )
        header = parse_json(file.read(header_bytes), f"{path}: header", _DAMAGED)
    if not isinstance(header, dict):
        raise QuantError(f"{path}: header is a JSON {type(header).__name__}, expected a table; {_DAMAGED}")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise QuantError(f"{path}: __metadata__ is not a table of strings; {_DAMAGED}")
    check_number(path, len(header), "tensors")
    check_number(path, len(metadata), "keys in __metadata__")
    data_start = 8 + header_bytes
    entries = sorted(
        (_entry(path, name, info, data_start) for name, info in header.items()), key=lambda e: (e.begin, e.end)
    )
    _check_coverage(path, entries, data_start, file_bytes)
    return metadata, entries


def check_header(text: bytes, tensors: int, keys: int) -> None:
    """Refuse a header that `read_safetensors_header` would refuse for its size.

    Raises:
        QuantError: too many bytes, values, tensors or keys of metadata.
    """
    size, values = len(text), count_values(text.decode())
    if size > MAX_HEADER_BYTES or values > MAX_VALUES or max(tensors, keys) > MAX_ITEMS:
        raise QuantError(
            f"a safetensors header of {size} bytes, {tensors} tensors, {keys} keys and {values} values, expected"
            f" at most {MAX_HEADER_BYTES}, {MAX_ITEMS}, {MAX_ITEMS} and {MAX_VALUES}; shorten the metadata"
        )


def check_number(path: Path, count: int, kind: str) -> None:
    """Refuse a number of items that no file has.

    Raises:
        QuantError: more than `MAX_ITEMS`.
    """
    if count > MAX_ITEMS:
        raise QuantError(f"{path}: {count} {kind}, expected at most {MAX_ITEMS}; {_DAMAGED}")


def _entry(path: Path, name: str, info: object, data_start: int) -> TensorEntry:
    match info:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if (
            all(type(size) is int and 0 <= size < _MAX_SIZE for size in shape)
            and len(shape) <= _MAX_DIMS
            and 0 <= begin <= end
        ):
            pass
        case _:
            raise QuantError(
                f"{path}: tensor {name}: malformed entry {str(info)[:120]}, expected dtype, shape and data_offsets;"
                f" {_DAMAGED}"
            )
    expected = math.prod(shape) * _ITEM_BYTES.get(dtype, 0)
    if dtype in _ITEM_BYTES and end - begin != expected:
        raise QuantError(
            f"{path}: tensor {name}: {end - begin} bytes for {dtype} {tuple(shape)}, expected {expected}; {_DAMAGED}"
        )
    return TensorEntry(name, dtype, tuple(shape), data_start + begin, data_start + end)


def _check_coverage(path: Path, entries: list[TensorEntry], data_start: int, file_bytes: int) -> None:
    """Check that each tensor starts where the one before ends, since the format allows neither overlaps nor gaps."""
    position = data_start
    for entry in entries:
        if entry.begin != position:
            raise QuantError(
                f"{path}: tensor {entry.name}: starts at byte {entry.begin}, expected {position}, so that tensors"
                f" neither overlap nor leave a gap; {_DAMAGED}"
            )
        position = entry.end
    if position != file_bytes:
        raise QuantError(
            f"{path}: tensors end at byte {position}, expected {file_bytes}, the end of the file; {_DAMAGED}"
        )
