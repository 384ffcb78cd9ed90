"""Journal, a record of the finished tensors of an unfinished file, from which a killed conversion is resumed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ..errors import QuantError
from .regular_file import check_path, create_or_open, open_regular
from .strict_json import parse_json

# Far more than the lines of all tensors of a model.
_MAX_BYTES = 1 << 22


class JournalEntry(NamedTuple):
    """A tensor that is completely in the file."""

    relative_error: float
    sha256: str
    """The SHA-256 of all bytes from the end of the header to the end of this tensor.

    It shows whether the disk has lost bytes, which are then written again.
    """
    with_next: bool = False
    """Whether the tensor is only kept together with the next one."""


def journal_of(path: Path) -> Path:
    """Return the path of the journal of an unfinished file."""
    return path.with_name(f".{path.name}.journal")


class Journal:
    """A file beside the unfinished one, with a line of JSON for each tensor."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self) -> None:
        """Refuse a name that is not usable or is taken by a folder; `delete` removes anything else."""
        check_path(self.path)
        if self.path.is_dir() and not self.path.is_symlink():
            raise QuantError(f"{self.path}: is a folder, expected a file or none; delete it")

    def read(self) -> list[JournalEntry]:
        """Return the entries up to the first that is cut off or damaged; none if there is no file."""
        entries: list[JournalEntry] = []
        with suppress(QuantError), open_regular(self.path) as file:
            for line in file.read(_MAX_BYTES).splitlines():
                match parse_json(line, str(self.path), "it is not used"):
                    case {"relative_error": float(error), "sha256": str(sha256), "with_next": bool(with_next)} if (
                        math.isfinite(error)
                    ):
                        entries.append(JournalEntry(error, sha256, with_next))
                    case _:
                        break
        return entries

    def restart(self, entries: Iterable[JournalEntry]) -> None:
        """Replace all entries by these."""
        self._write(entries, keep=False)

    def append(self, entry: JournalEntry) -> None:
        self._write([entry], keep=True)

    def delete(self) -> None:
        with suppress(OSError):
            self.path.unlink(missing_ok=True)

    def _write(self, entries: Iterable[JournalEntry], *, keep: bool) -> None:
        try:
            with create_or_open(self.path) as file:
                file.seek(0, os.SEEK_END if keep else os.SEEK_SET)
                file.truncate()
                file.writelines(json.dumps(entry._asdict()).encode() + b"\n" for entry in entries)
        except OSError as error:
            raise QuantError(f"{self.path}: cannot be written: {error.strerror}; check its folder and disk") from None
