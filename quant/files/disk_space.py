"""Room on the disk for files being written, and what killed jobs left of theirs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from ..errors import QuantError
from ..units import GIB
from .file_lock import try_lock

# Of all that is written in this way; other programs leave other files.
_SUFFIXES = (".gguf", ".safetensors")


def temporary_of(path: Path) -> Path:
    """Where a file is written until it is complete."""
    return path.with_name(f".{path.name}.tmp")


def check_space(nbytes: Mapping[Path, int]) -> None:
    """Refuses files whose volume has no room for all of them, what a killed job left of them counted as room.

    Raises:
        QuantError: less is free than they take.
    """
    volumes: dict[int, list[Path]] = {}
    for path in nbytes:
        with suppress(FileNotFoundError):  # without a folder, which its writer tells
            volumes.setdefault(path.parent.stat().st_dev, []).append(path)
    for paths in volumes.values():
        left = sum(temporary.stat().st_size for temporary in map(temporary_of, paths) if temporary.exists())
        free = shutil.disk_usage(paths[0].parent).free + left
        needed = sum(nbytes[path] for path in paths)
        if free < needed:
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            raise QuantError(
                f"{paths[0]}{more}: {needed / GIB:.2f} GiB needed, {free / GIB:.2f} GiB free in the folder;"
                + "; ".join((" free some space or choose another folder", *leftovers(paths)))
            )


def leftovers(paths: Collection[Path]) -> list[str]:
    """What killed jobs left of other files in the folders of these, each told in a sentence."""
    own = set(map(temporary_of, paths))
    found = {path for folder in {path.parent for path in paths} for path in folder.glob(".*.tmp")} - own
    return [told for path in sorted(found) if path.stem.endswith(_SUFFIXES) and (told := _told(path))]


def _told(temporary: Path) -> str:
    """Nothing where a job has it open."""
    with suppress(OSError), open(temporary, "rb") as file:
        if try_lock(file):
            name, size = temporary.stem[1:], os.fstat(file.fileno()).st_size
            return f"{temporary}: {size / GIB:.2f} GiB of a job that was killed; make {name} again or delete this file"
    return ""
