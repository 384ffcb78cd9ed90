"""The header of a safetensors file: written, and parsed with bounds on everything it says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import QuantError

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

_ITEM_BYTES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
    **{"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1},
}


class TensorEntry(NamedTuple):
    """A tensor as a file's header describes it; `begin` and `end` are bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_safetensors_header(path: Path) -> tuple[dict[str, str], list[TensorEntry]]:
    """The `__metadata__` of a file and its tensors in file order.

    Raises:
        QuantError: a header that is cut, not JSON or says impossible things.

    Source: "Format" of https://github.com/huggingface/safetensors, README.md
    """
    file_bytes = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        if start.startswith(b"GGUF"):
            raise QuantError(f"{path}: a GGUF file, expected safetensors; choose another file")
        header_bytes = int.from_bytes(start, "little")
        if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, file_bytes - 8):
            raise QuantError(
                f"{path}: header length {header_bytes} in a file of {file_bytes} bytes, at most {MAX_HEADER_BYTES}"
                " allowed; the file is cut or not safetensors"
            )
        header = _parse_json(path, file.read(header_bytes))
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise QuantError(f"{path}: __metadata__ is not a table of strings; the file is damaged")
    data_start = 8 + header_bytes
    entries = sorted(
        (_entry(path, name, info, data_start) for name, info in header.items()), key=lambda e: (e.begin, e.end)
    )
    _check_coverage(path, entries, data_start, file_bytes)
    return metadata, entries


def _parse_json(path: Path, data: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            raise ValueError("a name occurs twice")
        return table

    try:
        header = json.loads(data, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise QuantError(f"{path}: header is not JSON ({error}); the file is damaged or not safetensors") from error
    if not isinstance(header, dict):
        raise QuantError(f"{path}: header is a JSON {type(header).__name__}, not a table; the file is damaged")
    return header


def _entry(path: Path, name: str, info: object, data_start: int) -> TensorEntry:
    match info:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if (
            all(type(size) is int and size >= 0 for size in shape) and 0 <= begin <= end
        ):
            pass
        case _:
            raise QuantError(f"{path}: tensor {name}: malformed entry {str(info)[:120]}; the file is damaged")
    expected = math.prod(shape) * _ITEM_BYTES.get(dtype, 0)
    if dtype in _ITEM_BYTES and end - begin != expected:
        raise QuantError(
            f"{path}: tensor {name}: {end - begin} bytes for {dtype} {tuple(shape)}, expected {expected};"
            " the file is damaged"
        )
    return TensorEntry(name, dtype, tuple(shape), data_start + begin, data_start + end)


def _check_coverage(path: Path, entries: list[TensorEntry], data_start: int, file_bytes: int) -> None:
    """The format allows neither overlaps nor holes, so each tensor starts where the one before ended."""
    position = data_start
    for entry in entries:
        if entry.begin != position:
            raise QuantError(
                f"{path}: tensor {entry.name}: starts at byte {entry.begin}, expected {position};"
                " tensors overlap or leave a hole, the file is damaged"
            )
        position = entry.end
    if position != file_bytes:
        raise QuantError(f"{path}: tensors end at byte {position} of {file_bytes}; the file is cut or has a tail")
