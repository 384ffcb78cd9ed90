"""A file that appears under its name complete or not at all."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from ..errors import QuantError
from .disk_space import check_space, temporary_of
from .file_lock import try_lock


class AtomicFile:
    """A context manager: writes go to a temporary file beside `path`; `commit` renames it, leaving before deletes it.

    The temporary file is locked, so that one job at a time writes a destination. One that a killed job left behind is
    taken over: it is emptied, or, with `resume`, kept for `read` and `restart`.

    Raises:
        QuantError: on entering, when `path` exists and `overwrite` is off, when its folder is missing, unwritable or
            has less than `nbytes` bytes free, or when another job writes it; later, when the system refuses a write.
    """

    def __init__(self, path: Path, nbytes: int, *, overwrite: bool = False, resume: bool = False) -> None:
        self.path, self.nbytes, self.overwrite, self.resume = path, nbytes, overwrite, resume
        self._temporary = temporary_of(path)
        self._file: BinaryIO
        self._is_committed = False

    def __enter__(self) -> AtomicFile:
        self._check_destination()
        with self._reporting():
            check_space({self.path: self.nbytes})
            self._file = open(self._temporary, "r+b", opener=_open_or_create)
            if not (try_lock(self._file) and self._is_in_place()):
                self._file.close()
                raise QuantError(f"{self.path}: another job writes it; wait for that one, or choose another name")
        if not self.resume:
            self.restart(0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # No failure matters now: a full disk makes close fail again, and the next job takes over what stays.
        if sys.platform == "win32":  # deletes closed files only
            with suppress(OSError):
                self._file.close()
        if not self._is_committed:
            with suppress(OSError):
                self._temporary.unlink()
        with suppress(OSError):
            self._file.close()

    def read(self, nbytes: int) -> bytes:
        """The next bytes that a killed job left, fewer at the end."""
        with self._reporting():
            return self._file.read(nbytes)

    def restart(self, offset: int) -> None:
        """Drops what lies behind `offset`, where the next write goes."""
        with self._reporting():
            self._file.seek(offset)
            self._file.truncate()

    def flush(self) -> None:
        """Hands what was written to the system, which keeps it if this process is killed."""
        with self._reporting():
            self._file.flush()

    def write(self, content: bytes | memoryview) -> None:
        with self._reporting():
            self._file.write(content)

    def rewind(self) -> None:
        """The next write replaces the beginning of the file."""
        with self._reporting():
            self._file.seek(0)

    def commit(self) -> Path:
        """Puts the file in place.

        Returns:
            Its path: `path`, or a free name beside it where that is taken meanwhile or in use (Windows replaces no
            mapped file), so that hours of work are not lost.
        """
        with self._reporting():
            self._file.flush()
            os.fsync(self._file.fileno())
            if sys.platform == "win32":  # renames closed files only; elsewhere the lock is kept until it is done
                self._file.close()
            placed = self._rename()
            self._is_committed = True
            return placed

    def _rename(self) -> Path:
        if self.overwrite or not self.path.exists():
            with suppress(PermissionError):
                os.replace(self._temporary, self.path)
                return self.path
        free = next(name for name in self._other_names() if not name.exists())
        os.rename(self._temporary, free)
        return free

    def _is_in_place(self) -> bool:
        """Whether the open file still has its name: another job may have finished between opening and locking."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self._temporary.stat())
        except FileNotFoundError:
            return False

    def _other_names(self) -> Iterator[Path]:
        return (self.path.with_stem(f"{self.path.stem}-{number}") for number in range(1, 1000))

    def _check_destination(self) -> None:
        if not self.path.parent.is_dir():
            raise QuantError(f"{self.path}: its folder does not exist; create it or choose another one")
        if self.path.is_dir() or (self.path.exists() and not self.overwrite):
            raise QuantError(f"{self.path}: exists already; choose another name or allow overwriting")

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise QuantError(f"{self.path}: cannot be written: {error.strerror}; check its folder") from None


def _open_or_create(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o666)
