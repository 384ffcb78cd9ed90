"""Free disk space for the files to be written, and unfinished files that stopped processes left."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from ..errors import QuantError, escaped
from ..units import GIB, counted
from .file_lock import try_lock
from .regular_file import open_regular

# The suffixes of all files that this package writes. Other programs leave temporary files of other names.
_SUFFIXES = (".gguf", ".safetensors")


def temporary_of(path: Path) -> Path:
    """Return the path at which a file is written until it is complete."""
    return path.with_name(f".{path.name}.tmp")


def check_space(nbytes: Mapping[Path, int]) -> None:
    """Check that the volumes of some files have room for all of them.

    An unfinished file that a killed process left counts as room for the same file.

    Args:
        nbytes: the size of each file in bytes.

    Raises:
        QuantError: a volume has less free space than its files need.
    """
    volumes: dict[int, list[Path]] = {}
    for path in nbytes:
        with suppress(FileNotFoundError):  # AtomicFile reports a missing folder
            volumes.setdefault(path.parent.stat().st_dev, []).append(path)
    for paths in volumes.values():
        left = sum(temporary.stat().st_size for temporary in map(temporary_of, paths) if temporary.exists())
        free = shutil.disk_usage(paths[0].parent).free + left
        needed = sum(nbytes[path] for path in paths)
        if free < needed:
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            raise QuantError(
                f"{paths[0]}{more}: {needed / GIB:.2f} GiB needed, {free / GIB:.2f} GiB free in the folder;"
                + "; ".join((" free some space or choose another folder", *_left(paths)))
            )


def leftovers(paths: Collection[Path]) -> list[str]:
    """Return a sentence about each unfinished file of another name that a stopped process left in these folders."""
    return [
        escaped(
            f"{path}: {size / GIB:.2f} GiB left by a process that stopped;"
            f" write {path.stem[1:]} again to complete it, or delete this file"
        )
        for path, size in _unfinished(paths)
    ]


def _left(paths: Collection[Path]) -> list[str]:
    """Return a short text about all such files, or nothing."""
    found = list(_unfinished(paths))
    total = sum(size for _, size in found) / GIB
    first = "".join(f", the first is {path.name}" for path, _ in found[:1])
    files = f"{counted(len(found), 'file')} that stopped processes left unfinished"
    return [f"{total:.2f} GiB are in {files}{first}"] if found else []


def _unfinished(paths: Collection[Path]) -> Iterator[tuple[Path, int]]:
    """Yield the unfinished files, and their sizes in bytes, that no process is writing."""
    own = set(map(temporary_of, paths))
    found = {path for folder in {path.parent for path in paths} for path in folder.glob(".*.tmp")} - own
    for path in sorted(found):
        if path.stem.endswith(_SUFFIXES):
            with suppress(OSError, QuantError), open_regular(path) as file:
                if try_lock(file):
                    yield path, os.fstat(file.fileno()).st_size
