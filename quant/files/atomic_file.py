"""AtomicFile, a file that appears under its name complete or not at all."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from ..errors import FileInUseError, QuantError
from .disk_space import check_space, temporary_of
from .file_lock import try_lock
from .regular_file import check_path, create_or_open


class AtomicFile:
    """A context manager that writes to a temporary file beside `path`.

    `commit` renames the temporary file to `path`. Leaving the `with` block before that deletes it. The temporary file
    is locked, so that only one process at a time writes a destination.

    Args:
        nbytes: the size that the file will have, for which the folder must have room.
        overwrite: `path` may exist; `commit` replaces it.
        resume: keep the content of a temporary file that a killed process left, for `read` and `restart`. Otherwise it
            is emptied.
        keep: an exception leaves the temporary file as a killed process would.

    Raises:
        QuantError: on entering, `path` exists and `overwrite` is off, another process is writing the file, or its
            folder is missing, unwritable or has too little space. Later, a write fails.
    """

    def __init__(
        self, path: Path, nbytes: int, *, overwrite: bool = False, resume: bool = False, keep: bool = False
    ) -> None:
        self.path, self.nbytes, self.overwrite, self.resume, self.keep = path, nbytes, overwrite, resume, keep
        self._temporary = temporary_of(path)
        self._file: BinaryIO
        self._is_committed = False

    def __enter__(self) -> AtomicFile:
        self._check_destination()
        with self._reporting():
            check_space({self.path: self.nbytes})
            self._file = create_or_open(self._temporary)
            if not (try_lock(self._file) and self._is_in_place()):
                self._file.close()
                raise FileInUseError(
                    f"{self.path}: another process is writing it; wait for that one or choose another name"
                )
        if not self.resume:
            self.restart(0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Failures are ignored here. On a full disk, close fails again. The next process takes over a file that stays.
        if sys.platform == "win32":  # Windows deletes only closed files
            with suppress(OSError):
                self._file.close()
        if not self._is_committed and not (self.keep and kind):
            with suppress(OSError):
                self._temporary.unlink()
        with suppress(OSError):
            self._file.close()

    def read(self, nbytes: int) -> bytes:
        """Return the next bytes that a killed process left, fewer than `nbytes` at the end."""
        with self._reporting():
            return self._file.read(nbytes)

    def restart(self, offset: int) -> None:
        """Cut the file off at `offset` bytes, where the next write begins."""
        with self._reporting():
            self._file.seek(offset)
            self._file.truncate()

    def flush(self) -> None:
        """Pass what was written to the operating system, which keeps it if this process is killed."""
        with self._reporting():
            self._file.flush()

    def write(self, content: bytes | memoryview) -> None:
        """Write at the current position."""
        with self._reporting():
            self._file.write(content)

    def rewind(self) -> None:
        """Move to the beginning of the file, which the next write replaces."""
        with self._reporting():
            self._file.seek(0)

    def commit(self) -> Path:
        """Move the file to its path.

        Returns:
            `path`, or a free name beside it, so that hours of work are not lost. That is used if `path` has appeared
            since, or if Windows refuses to replace it because a process has it mapped.
        """
        with self._reporting():
            self._file.flush()
            os.fsync(self._file.fileno())
            if sys.platform == "win32":  # renames only closed files; elsewhere the lock is held until then
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
        """Return whether the open file still has its name; another process may have renamed it before it was locked."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self._temporary.stat())
        except FileNotFoundError:
            return False

    def _other_names(self) -> Iterator[Path]:
        return (self.path.with_stem(f"{self.path.stem}-{number}") for number in range(1, 1000))

    def _check_destination(self) -> None:
        check_path(self.path, self._temporary)
        if self.path.is_symlink():
            raise QuantError(f"{self.path}: is a link, which is not replaced; delete it, or choose another name")
        if not self.path.parent.is_dir():
            raise QuantError(f"{self.path}: its folder does not exist; create the folder or choose another")
        if self.path.exists() and not (self.path.is_file() or self.path.is_dir()):
            raise QuantError(f"{self.path}: is a pipe or a device, expected a file; choose another name")
        if self.path.is_dir() or (self.path.exists() and not self.overwrite):
            raise QuantError(
                f"{self.path}: exists already, expected a new name; choose another name or allow overwriting"
            )

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise QuantError(f"{self.path}: cannot be written: {error.strerror}; check its folder and disk") from None
