"""ConditioningCache, encoded prompts that outlive the process, in a folder of limited size."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from ..quant import QuantError
from ..quant.units import GIB
from .conditioning import Conditioning, load_conditioning, save_conditioning

_SUFFIXES = (".safetensors", ".tmp")  # the second is that of files that killed processes left


class ConditioningCache:
    """Conditionings by key, each in a file of Save Conditioning's format; the least recently used go first.

    Several processes may share the folder: files appear complete, and one that another process deletes is not found.

    Args:
        folder: made at the first `save`.
        max_bytes: the size in bytes that all files may have together.
    """

    def __init__(self, folder: Path, max_bytes: int = GIB) -> None:
        self.folder, self.max_bytes = folder, max_bytes

    def load(self, key: str) -> Conditioning | None:
        """Return the conditioning that was saved under a key, or None if there is none or its file is damaged."""
        path = self._path(key)
        try:
            found = load_conditioning(str(path), checksum=True)
        except (QuantError, OSError):
            return None
        with suppress(OSError):
            os.utime(path)  # its time is that of the last use, because many systems keep no time of access
        return found

    def save(self, key: str, conditioning: Conditioning) -> None:
        """Keep a conditioning under a key, and delete the least recently used files above `max_bytes`.

        Args:
            key: letters and digits, as they may stand in a file name.
            conditioning: what `load` returns from then on.

        Raises:
            QuantError: the file cannot be written, or another process is writing it.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise QuantError(f"{self.folder}: cannot be made ({error.strerror}); check its permissions") from None
        save_conditioning(conditioning, str(self._path(key)), checksum=True)
        self._evict()

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _evict(self) -> None:
        found = []
        for entry in os.scandir(self.folder):
            with suppress(OSError):  # another process deleted it
                status = entry.stat(follow_symlinks=False)
                if entry.name.endswith(_SUFFIXES) and entry.is_file(follow_symlinks=False):
                    found.append((status.st_mtime_ns, entry.path, status.st_size))
        excess = sum(nbytes for _, _, nbytes in found) - self.max_bytes
        for _, path, nbytes in sorted(found):
            if excess <= 0:
                break
            with suppress(OSError):  # Windows deletes no file that a process has mapped
                os.unlink(path)
                excess -= nbytes
