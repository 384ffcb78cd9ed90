"""GGUF headers: the checked metadata and tensor records of a file, or of all parts of a split file.

Source: ggml docs/gguf.md; split keys: the PyPI package gguf 0.19, gguf_writer.py add_shard_kv_data;
`comfy.gguf.orig_shape.<name>` and 5-D tensors: city96/ComfyUI-GGUF loader.py get_orig_shape @ 001ffcf.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import QuantError
from ..files.lookalikes import HEAD_BYTES, lookalike
from ..files.regular_file import check_path, open_regular
from ..files.shards import Shard
from ..qtype import QuantType, qtype_of
from .file_identity import FileIdentity
from .values import DAMAGED, MAX_ITEMS, HeaderReader

DEFAULT_ALIGNMENT = 32
ORIG_SHAPE_KEY = "comfy.gguf.orig_shape."

_MAX_ALIGNMENT = 1 << 16
# ggml allows 4. Existing ComfyUI packs store the 5-D patch embeddings of video models as they are.
_MAX_DIMS = 5
_MAX_ORIG_DIMS = 8
_MIN_TENSOR_INFO_BYTES = 24
_MIN_METADATA_BYTES = 13
_SAFETENSORS = re.compile(rb".{6}\0\0\{", re.DOTALL)


@dataclass(frozen=True)
class TensorRecord:
    """What a header says about a tensor; `shape` is that of the model, `stored_shape` that in the file.

    Both are in torch's order.
    """

    name: str
    qtype: QuantType
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]
    path: Path
    offset: int
    """Bytes from the start of `path`."""
    nbytes: int

    @property
    def stored(self) -> str:
        """The name of the type in reports, where ComfyUI's own NVFP4 is another one."""
        return f"{self.qtype.name} (GGUF)" if self.qtype.name == "NVFP4" else self.qtype.name


@dataclass(frozen=True)
class Header:
    """The metadata and the tensor records of a GGUF; a split file has one header for all parts."""

    path: Path
    metadata: Mapping[str, Any]
    """Values are Python scalars, or for arrays: numpy arrays, StringArrays, or tuples of these."""
    tensors: Mapping[str, TensorRecord]
    parts: tuple[FileIdentity, ...]

    @property
    def size(self) -> int:
        """The bytes of all parts."""
        return sum(part.size for part in self.parts)

    def check_unchanged(self) -> None:
        """Raise QuantError if a file is no longer the one that was read."""
        for part in self.parts:
            part.check_unchanged()


@dataclass(frozen=True)
class _Part:
    identity: FileIdentity
    metadata: dict[str, Any]
    records: list[TensorRecord]


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read the header of a GGUF, including those of all parts if `path` is one of `-00001-of-0000N.gguf`.

    Raises:
        QuantError: the file is not a well-formed GGUF of known types; the message is one line with the file and field.
    """
    path = Path(path)
    check_path(path)
    parts = [_read_part(part_path) for part_path in _part_paths(path)]
    if len(parts) > 1 or "split.count" in parts[0].metadata:
        _check_split(parts)
    return _combined(path, parts)


def check_readable(path: Path, header: bytes, size: int) -> None:
    """Refuse a header that `read_header` would refuse in a file of `size` bytes.

    Raises:
        QuantError: a name, a key, a shape or their number is outside the limits of the reader.
    """
    identity = FileIdentity(path, 0, 0, size, 0)
    try:
        _combined(path, [_parse(HeaderReader(path, BytesIO(header), size), identity)])
    except QuantError as error:
        problem = str(error).removesuffix(f"; {DAMAGED}")
        raise QuantError(f"{problem}; change the names or the metadata of the source") from None


def _combined(path: Path, parts: Sequence[_Part]) -> Header:
    metadata: dict[str, Any] = {}
    for part in parts:
        for key, value in part.metadata.items():
            if not key.startswith("split."):
                metadata.setdefault(key, value)
    tensors: dict[str, TensorRecord] = {}
    n_tensors = sum(len(part.records) for part in parts)
    if n_tensors > MAX_ITEMS:
        raise QuantError(f"{path}: {n_tensors} tensors in all parts, expected at most {MAX_ITEMS}; {DAMAGED}")
    for record in (record for part in parts for record in part.records):
        if record.name in tensors:
            raise _tensor_error(record, f"appears twice, expected unique names; {DAMAGED}")
        tensors[record.name] = replace(record, shape=_logical_shape(record, metadata))
    return Header(path, metadata, tensors, tuple(part.identity for part in parts))


def alignment_of(metadata: Mapping[str, Any], path: Path) -> int:
    """Return `general.alignment` in bytes, a power of two.

    Raises:
        QuantError: the value in the metadata is not one.
    """
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise QuantError(
            f"{path}: general.alignment: {alignment!r:.40}, expected a power of two up to {_MAX_ALIGNMENT}; {DAMAGED}"
        )
    return alignment


def _part_paths(path: Path) -> list[Path]:
    shard = Shard.parse(path.name)
    if shard is None or shard.suffix.lower() != ".gguf":
        return [path]
    paths = shard.series(path.parent)
    missing = next((part for part in paths if not part.exists()), None)
    if missing is not None:
        raise QuantError(f"{missing}: missing, expected all {shard.total} parts of the model; put them into one folder")
    return paths or [path]


def _check_split(parts: Sequence[_Part]) -> None:
    n_tensors = sum(len(part.records) for part in parts)
    for number, part in enumerate(parts):
        expected = {"split.no": number, "split.count": len(parts), "split.tensors.count": n_tensors}
        for key, value in expected.items():
            found = part.metadata.get(key, value)
            if not isinstance(found, int) or found != value:
                raise QuantError(
                    f"{part.identity.path}: {key}: {found!r:.40}, expected {value} from the parts found;"
                    " put all parts of one download into one folder, named <model>-00001-of-0000N.gguf"
                )


def _read_part(path: Path) -> _Part:
    identity = FileIdentity.of(path)
    try:
        with open_regular(path) as file:
            return _parse(HeaderReader(path, file, identity.size), identity)
    except OSError as error:
        raise QuantError(f"{path}: cannot be read: {error.strerror}; check its permissions") from None


def _parse(reader: HeaderReader, identity: FileIdentity) -> _Part:
    _check_format(reader)
    n_tensors = reader.count("tensor count", _MIN_TENSOR_INFO_BYTES)
    n_metadata = reader.count("metadata count", _MIN_METADATA_BYTES)
    metadata: dict[str, Any] = {}
    for number in range(n_metadata):
        key = reader.name(f"metadata key {number}")
        if key in metadata:
            raise reader.error(key, f"this metadata key appears twice, expected unique keys; {DAMAGED}")
        metadata[key] = reader.value(key)
    alignment = alignment_of(metadata, reader.path)
    records = [_read_tensor_info(reader, number) for number in range(n_tensors)]
    data_offset = -(-reader.position // alignment) * alignment
    return _Part(identity, metadata, _place(records, data_offset, alignment, reader.size))


def _check_format(reader: HeaderReader) -> None:
    head = reader.take(min(reader.size, HEAD_BYTES), "magic")
    if not head.startswith(b"GGUF"):
        raise reader.error("magic", f"expected b'GGUF', got {_kind(head)}")
    reader.position = 4
    version = reader.u32("version")
    if version and not version & 0xFFFF:
        raise reader.error("version", "a big-endian GGUF, expected little-endian; get or convert a little-endian file")
    if version not in (2, 3):
        raise reader.error("version", f"{version}, expected 2 or 3; get or convert a file of a current version")


def _kind(head: bytes) -> str:
    if _SAFETENSORS.match(head):
        return "a safetensors file; rename it to .safetensors and convert it"
    return lookalike(head) or (f"{head[:4]!r}; {DAMAGED}" if head else "an empty file; download or convert it again")


def _read_tensor_info(reader: HeaderReader, number: int) -> TensorRecord:
    name = reader.name(f"name of tensor {number}")
    field = f"tensor {name}"
    n_dims = reader.u32(field)
    if n_dims > _MAX_DIMS:
        raise reader.error(field, f"{n_dims} dimensions, expected at most {_MAX_DIMS}; {DAMAGED}")
    shape = tuple(reader.u64(field) for _ in range(n_dims))[::-1]
    type_id = reader.u32(field)
    if 0 in shape:
        raise reader.error(field, f"shape {shape}, expected no dimension of size 0; {DAMAGED}")
    try:
        qtype = qtype_of(type_id)
        nbytes = prod(qtype.packed_shape(shape or (1,)))
    except QuantError as error:
        raise reader.error(field, str(error)) from None
    return TensorRecord(name, qtype, shape, shape, reader.path, reader.u64(field), nbytes)


def _place(records: Sequence[TensorRecord], data_offset: int, alignment: int, size: int) -> list[TensorRecord]:
    """Return the records with offsets from the start of the file, after checking that each tensor has its own bytes."""
    placed = [replace(record, offset=data_offset + record.offset) for record in records]
    for record in placed:
        if record.offset % alignment:
            raise _tensor_error(
                record, f"offset {record.offset}, expected a multiple of general.alignment {alignment}; {DAMAGED}"
            )
        if record.offset + record.nbytes > size:
            raise _tensor_error(
                record,
                f"{record.nbytes} bytes of data at offset {record.offset} end past the end of the file ({size} bytes);"
                " the file is cut off, download or convert it again",
            )
    for before, after in pairwise(sorted(placed, key=lambda record: record.offset)):
        if before.offset + before.nbytes > after.offset:
            raise _tensor_error(after, f"its data overlaps that of {before.name}, expected separate data; {DAMAGED}")
    return placed


def _logical_shape(record: TensorRecord, metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the shape that the model has for a tensor whose stored shape may be a flattened one."""
    key = ORIG_SHAPE_KEY + record.name
    if key not in metadata:
        return record.stored_shape
    dims = metadata[key]
    if not isinstance(dims, np.ndarray) or dims.dtype.kind not in "iu" or dims.size > _MAX_ORIG_DIMS:
        raise QuantError(
            f"{record.path}: {key}: expected an array of up to {_MAX_ORIG_DIMS} integers, got {_described(dims)};"
            f" {DAMAGED}"
        )
    shape = tuple(dims.tolist())
    if min(shape, default=1) < 1 or prod(shape) != prod(record.stored_shape):
        raise QuantError(
            f"{record.path}: {key}: {shape}, expected as many elements as the stored {record.stored_shape}; {DAMAGED}"
        )
    return shape


def _described(value: object) -> str:
    return f"{value.size} numbers of {value.dtype}" if isinstance(value, np.ndarray) else f"{value!r:.40}"


def _tensor_error(record: TensorRecord, problem: str) -> QuantError:
    return QuantError(f"{record.path}: tensor {record.name}: {problem}")
