"""A file that appears under its name complete or not at all."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from .errors import QuantError

if sys.platform != "win32":
    import fcntl

_GIB = 1 << 30


class AtomicFile:
    """A context manager: writes go to a temporary file beside `path`; `commit` renames it, leaving before deletes it.

    What a killed writer of the same destination left behind is deleted first.

    Raises:
        QuantError: on entering, when `path` exists and `overwrite` is off, or its folder is missing, unwritable or has
            less than `nbytes` bytes free; later, when the system refuses a write.
    """

    def __init__(self, path: Path, nbytes: int, *, overwrite: bool = False) -> None:
        self.path, self.nbytes, self.overwrite = path, nbytes, overwrite
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._file: BinaryIO

    def __enter__(self) -> AtomicFile:
        self._check_destination()
        with self._reporting():
            _delete_stale(self.path)
            self._check_space()
            self._file = self._temporary.open("xb")
            _try_lock(self._file)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Neither failure matters now: a full disk makes close fail again, and the next writer deletes what stays.
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            self._temporary.unlink()

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
            self._file.close()
            if self.overwrite or not self.path.exists():
                with suppress(PermissionError):
                    os.replace(self._temporary, self.path)
                    return self.path
            free = next(name for name in self._other_names() if not name.exists())
            os.rename(self._temporary, free)
            return free

    def _other_names(self) -> Iterator[Path]:
        return (self.path.with_stem(f"{self.path.stem}-{number}") for number in range(1, 1000))

    def _check_destination(self) -> None:
        if not self.path.parent.is_dir():
            raise QuantError(f"{self.path}: its folder does not exist; create it or choose another one")
        if self.path.is_dir() or (self.path.exists() and not self.overwrite):
            raise QuantError(f"{self.path}: exists already; choose another name or allow overwriting")

    def _check_space(self) -> None:
        free = shutil.disk_usage(self.path.parent).free
        if free < self.nbytes:
            raise QuantError(
                f"{self.path}: needs {self.nbytes / _GIB:.2f} GiB, {free / _GIB:.2f} GiB are free in its folder;"
                " free some space or choose another folder"
            )

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except FileExistsError:
            raise QuantError(f"{self._temporary}: exists already; wait for the other job that writes it") from None
        except OSError as error:
            raise QuantError(f"{self.path}: cannot be written: {error.strerror}; check its folder") from None


def _delete_stale(path: Path) -> None:
    temporary = re.compile(re.escape(f".{path.name}.") + r"\d+\.tmp")
    for stale in [name for name in path.parent.iterdir() if temporary.fullmatch(name.name)]:
        # Gone by now, or held open by a living process on Windows, which refuses to delete it.
        with suppress(OSError):
            with stale.open("r+b") as file:
                abandoned = _try_lock(file)
            if abandoned:
                stale.unlink()


def _try_lock(file: BinaryIO) -> bool:
    """Locks a file until it is closed; False if another writer has it."""
    # A process id in the name does not tell whether the writer lives: containers reuse them, network folders mix them.
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
