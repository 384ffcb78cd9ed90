"""What is finished of a file being written, so that the next job goes on where a killed one stopped."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ..errors import QuantError


class JournalEntry(NamedTuple):
    """A tensor that is in the file whole."""

    relative_error: float
    sha256: str
    """Of all bytes behind the header, up to the end of this tensor: what the system lost is written again."""


class Journal:
    """A file beside the temporary one, with a line of JSON for each tensor."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[JournalEntry]:
        """The entries up to the first that is cut or damaged; none without a file."""
        entries: list[JournalEntry] = []
        with suppress(OSError, ValueError, TypeError):
            for line in self.path.read_text().splitlines():
                entries.append(JournalEntry(**json.loads(line)))
        return entries

    def restart(self, entries: Iterable[JournalEntry]) -> None:
        """Keeps these entries only."""
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
            raise QuantError(f"{self.path}: cannot be written: {error.strerror}; check its folder") from None
