"""Opening of files and folders of any supported layout, as lists of stored tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import QuantError
from ..files.regular_file import check_path, open_regular
from ..files.safetensors_header import MAX_HEADER_BYTES, check_number, read_safetensors_header
from ..files.shards import Shard, check_shards
from ..files.strict_json import parse_json
from ..gguf.header import read_header
from .files import HashedFile
from .tensors import StoredTensor

_SUFFIX = ".safetensors"
_INDEX = re.compile(r"(?P<stem>.+)\.safetensors\.index(?:\.\w{1,16})?\.json", re.IGNORECASE)
"""The name of an index, which may have a variant before its last suffix."""
_MAX_NAME_BYTES = 255

_PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
_PICKLE_MAGICS = (b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(2, 6)))


class OpenedFiles(NamedTuple):
    """The files of a source and their tensors, in the order of their data."""

    files: list[HashedFile]
    metadata: Mapping[str, Any]
    """All metadata of a GGUF, or the `__metadata__` of safetensors."""
    tensors: list[StoredTensor]
    is_gguf: bool


def shard_of(path: Path) -> tuple[str, int]:
    """Return the name of a checkpoint without suffix and shard number, and the shard number (1 if not a shard)."""
    shard = Shard.parse(path.name)
    if shard:
        return shard.stem, shard.number
    index = _INDEX.fullmatch(path.name)
    return (index["stem"] if index else path.name if path.is_dir() else path.stem), 1


def open_files(path: Path) -> OpenedFiles:
    """Open a safetensors file, a GGUF with all its parts, a folder of shards, their index, or one of the shards.

    Without an index, the number of shards is read from their file names.

    Raises:
        QuantError: no such file, a pickle, a damaged header, a missing shard, or a tensor in two shards.
    """
    check_path(path)
    shard = _shard(path)
    path = (shard and _index_of(path, shard)) or path
    if path.is_dir():
        return _open_folder(path)
    if _INDEX.fullmatch(path.name):
        return _open_shards(path)
    if not path.is_file():
        raise QuantError(
            f"{path}: no such file; give the path of a .safetensors or .gguf file, or of a folder of shards"
        )
    try:
        magic = _magic(path)
        return _open_gguf(path) if magic[:4] == b"GGUF" else _open_safetensors(_series(path))
    except OSError as error:
        raise QuantError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def _magic(path: Path) -> bytes:
    with open_regular(path) as file:
        magic = file.read(8)
    # The length of a small safetensors header can look like the first bytes of a pickle.
    is_pickle = magic.startswith(_PICKLE_MAGICS) and int.from_bytes(magic, "little") > MAX_HEADER_BYTES
    if is_pickle or path.suffix.lower() in _PICKLE_SUFFIXES:
        raise QuantError(
            f"{path}: a PyTorch pickle ({path.suffix or 'no suffix'}), which can run code when opened;"
            " save it as .safetensors and convert that"
        )
    return magic


def _open_gguf(path: Path) -> OpenedFiles:
    header = read_header(path)
    files = {part.path: HashedFile(part.path, part) for part in header.parts}
    tensors = [
        StoredTensor(t.name, t.qtype.name, t.shape, t.offset, t.nbytes, files[t.path]) for t in header.tensors.values()
    ]
    order = {part: number for number, part in enumerate(files)}
    tensors.sort(key=lambda tensor: (order[tensor.file.path], tensor.offset))
    return OpenedFiles(list(files.values()), header.metadata, tensors, is_gguf=True)


def _open_safetensors(paths: list[Path]) -> OpenedFiles:
    files: list[HashedFile] = []
    metadata: dict[str, str] = {}
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        files.append(HashedFile(path))  # Before its header is read, so that a file replaced meanwhile is noticed.
        of_file, entries = read_safetensors_header(path)
        metadata |= of_file
        for e in entries:
            if e.name in tensors:
                raise QuantError(
                    f"{path}: tensor {e.name}: is in {tensors[e.name].file.path.name} too, expected every tensor in one"
                    " shard only; download the shards again"
                )
            tensors[e.name] = StoredTensor(e.name, e.dtype, e.shape, e.begin, e.end - e.begin, files[-1])
    return OpenedFiles(files, metadata, list(tensors.values()), is_gguf=False)


def _open_folder(folder: Path) -> OpenedFiles:
    """Open the shards that the index lists; without an index, the folder must hold one series of shards only."""
    indexes = sorted(path for path in folder.glob("*") if _INDEX.fullmatch(path.name))
    if len(indexes) == 1:
        return _open_shards(indexes[0])
    files = sorted(path for path in folder.glob("*") if path.name.lower().endswith(_SUFFIX))
    if indexes or not files or not set(files) <= set(_series(files[0])):
        raise QuantError(
            f"{folder}: {len(indexes)} files *{_SUFFIX}.index.json and {len(files)} *.safetensors in it, expected one"
            " index or the shards of one checkpoint; give the path of a file instead"
        )
    return _open_safetensors(_series(files[0]))


def _index_of(path: Path, shard: Shard) -> Path | None:
    """Return the index beside a shard, if there is one."""
    variant = shard.suffix[: -len(_SUFFIX)]
    suffixes = (f"{_SUFFIX}.index{variant}.json", f"{shard.suffix}.index.json", f"{_SUFFIX}.index.json".upper())
    indexes = (path.with_name(shard.stem + suffix) for suffix in suffixes)
    return next((index for index in indexes if index.is_file()), None)


def _series(path: Path) -> list[Path]:
    """Return all shards of the series that the file belongs to, or the file itself if it is not a shard."""
    shard = _shard(path)
    return _present(shard.series(path.parent)) if shard else [path]


def _shard(path: Path) -> Shard | None:
    shard = Shard.parse(path.name)
    return shard if shard and shard.suffix.lower().endswith(_SUFFIX) else None


def _present(shards: list[Path]) -> list[Path]:
    missing = next((shard for shard in shards if not shard.is_file()), None)
    if missing is not None:
        raise QuantError(f"{missing}: missing, expected all {len(shards)} shards in the folder; download it too")
    return shards


def _open_shards(index: Path) -> OpenedFiles:
    listed = _read_index(index)
    opened = _open_safetensors(_present([index.parent / name for name in sorted(set(listed.values()))]))
    found = {tensor.name: tensor.file.path.name for tensor in opened.tensors}
    for name in {**listed, **found}:
        if listed.get(name) != found.get(name):
            raise QuantError(
                f"{index}: tensor {name}: listed in {listed.get(name, 'no shard')}, found in"
                f" {found.get(name, 'no shard')}; download the index and the shards again"
            )
    return opened


def _read_index(index: Path) -> dict[str, str]:
    """Return the name of the shard of each tensor."""

    advice = "download it again"
    with open_regular(index) as file:
        content = file.read(MAX_HEADER_BYTES + 1)
    if len(content) > MAX_HEADER_BYTES:
        raise QuantError(f"{index}: more than {MAX_HEADER_BYTES} bytes, expected an index of shards; {advice}")
    match parse_json(content, f"{index}: the index", advice):
        case {"weight_map": dict(listed)} if all(isinstance(shard, str) for shard in listed.values()):
            shards = {name: shard.removeprefix("./") for name, shard in listed.items()}
        case _:
            raise QuantError(f"{index}: no weight_map with the file of each tensor, expected an index; {advice}")
    check_number(index, len(shards), "tensors")
    check_shards(index, len(set(shards.values())))
    outside = next((shard for shard in shards.values() if not _is_name(shard)), None)
    if outside is not None or not shards:
        raise QuantError(f"{index}: shard {outside!r:.80}, expected names of files beside the index; {advice}")
    return shards


def _is_name(shard: str) -> bool:
    return (
        0 < len(shard.encode(errors="replace")) <= _MAX_NAME_BYTES and "\0" not in shard and Path(shard).name == shard
    )
