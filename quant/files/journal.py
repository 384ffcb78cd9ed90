"""Journal, a record of the finished tensors of an unfinished file, from which a killed conversion is resumed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ..errors import QuantError


class JournalEntry(NamedTuple):
    """A tensor that is completely in the file."""

    relative_error: float
    sha256: str
    """The SHA-256 of all bytes from the end of the header to the end of this tensor.

    It shows whether the disk has lost bytes, which are then written again.
    """


class Journal:
    """A file beside the unfinished one, with a line of JSON for each tensor."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[JournalEntry]:
        """Return the entries up to the first that is cut off or damaged; none if there is no file."""
        entries: list[JournalEntry] = []
        with suppress(OSError, ValueError, TypeError):
            for line in self.path.read_text().splitlines():
                entries.append(JournalEntry(**json.loads(line)))
        return entries

    def restart(self, entries: Iterable[JournalEntry]) -> None:
        """Replace all entries by these."""
        self._write("w", entries)

    def append(self, entry: JournalEntry) -> None:
        self._write("a", [entry])

    def delete(self) -> None:
        with suppress(OSError):
            self.path.unlink(missing_ok=True)

    def _write(self, mode: str, entries: Iterable[JournalEntry]) -> None:
        try:
            with open(self.path, mode) as file:
                file.writelines(json.dumps(entry._asdict()) + "\n" for entry in entries)
        except OSError as error:
            raise QuantError(f"{self.path}: cannot be written: {error.strerror}; check its folder and disk") from None
