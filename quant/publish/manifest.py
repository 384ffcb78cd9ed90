"""The manifest of a publication: what is in its folder, what is missing and why, and the sums of all files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import QuantError
from ..files.atomic_file import AtomicFile
from ..files.regular_file import open_regular
from ..files.strict_json import parse_json
from ..gguf.provenance import VERSION
from .entry import Entry
from .job import Result

MANIFEST, SUMS = "manifest.json", "SHA256SUMS"
_MAX_BYTES = 64 << 20


class Manifest:
    """The entries of the files in a folder by their relative paths; those of earlier runs stay while the files do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Entry] = {}
        self.missing: dict[str, str] = {}
        """Why a file is missing, by its path."""
        with suppress(QuantError), open_regular(folder / MANIFEST) as file:
            content = parse_json(file.read(_MAX_BYTES), str(folder / MANIFEST), "it is not used")
            for entry in content["files"] if isinstance(content, dict) else ():
                if _is_there(folder, entry):
                    self.files[entry["path"]] = entry

    def add(self, results: Iterable[Result], command: str) -> None:
        """Add the results of a job, made by this command."""
        for result in results:
            path = self._relative(result.destination)
            if result.entry is None:
                self.missing[path] = result.why
                continue
            placed = self._relative(result.destination.with_name(result.entry["file"]))
            self.files[placed] = {"path": placed, **result.entry, "command": command}

    def entry(self, path: Path) -> Entry | None:
        """Return what an earlier run found of a file that is still the same, if any."""
        return self.files.get(self._relative(path))

    def models(self) -> Mapping[str, Sequence[Entry]]:
        """Return the entries by the folder of their model, in the order of their bytes."""
        found: dict[str, list[Entry]] = {}
        for path, entry in sorted(self.files.items(), key=lambda item: (-item[1]["bytes"], item[0])):
            found.setdefault(Path(path).parent.as_posix(), []).append(entry)
        return dict(sorted(found.items()))

    def json(self) -> dict[str, Any]:
        """Return the content of `manifest.json`."""
        missing = [{"path": path, "why": why} for path, why in sorted(self.missing.items())]
        return {
            "wanquant": VERSION,
            "complete": not missing,
            "files": [self.files[path] for path in sorted(self.files)],
            "missing": missing,
        }

    def sums(self) -> str:
        """Return the content of `SHA256SUMS`, as `sha256sum --check` reads it."""
        return "".join(_sum_line(self.files[path]["sha256"], path) for path in sorted(self.files))

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix() if path.is_relative_to(self.folder) else path.as_posix()


def _sum_line(sha256: str, path: str) -> str:
    """Return a line of sums; as `sha256sum` does, one with a backslash in front has escapes in its name."""
    name = path.replace("\\", r"\\").replace("\n", r"\n")
    mark = "" if name == path else "\\"
    return f"{mark}{sha256}  {name}\n"


def write_text(path: Path, text: str) -> None:
    """Replace a text file, which is complete or not there at any time.

    Raises:
        QuantError: it cannot be written.
    """
    content = text.encode()
    with AtomicFile(path, len(content), overwrite=True) as file:
        file.write(content)
        file.commit()


def as_text(content: Mapping[str, Any]) -> str:
    """Return a manifest as the text of its file."""
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _is_there(folder: Path, entry: Any) -> bool:  # noqa: ANN401
    """Return whether the file of an entry is what it was."""
    match entry:
        case {"path": str(path), "bytes": int(nbytes), "mtime_ns": int(mtime), "sha256": str()}:
            with suppress(OSError, ValueError):
                status = (folder / path).stat()
                return (status.st_size, status.st_mtime_ns) == (nbytes, mtime)
    return False
