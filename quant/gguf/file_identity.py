"""FileIdentity, by which a path that leads to another or a changed file is noticed."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path

from ..errors import QuantError


@dataclass(frozen=True)
class FileIdentity:
    """Properties of a file that show whether a path still leads to the same, unchanged file."""

    path: Path
    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> FileIdentity:
        """Return the identity of the file that is now at the path.

        Raises:
            QuantError: there is no readable file.
        """
        try:
            status = path.stat()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise QuantError(f"{path}: cannot be read: {reason}; check the path and load again") from None
        if not stat.S_ISREG(status.st_mode):
            raise QuantError(f"{path}: a folder, pipe or device, expected a file; choose a file")
        return cls(path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def check_unchanged(self) -> None:
        """Raise QuantError if the path leads to another or a changed file."""
        if FileIdentity.of(self.path) != self:
            raise QuantError(f"{self.path}: the file was changed or replaced since it was loaded; load the model again")

    def displaced(self) -> str | None:
        """Return what happened to the path, "deleted" or "replaced by another", or None.

        A mapping of the file is intact in all three cases.

        Raises:
            QuantError: the file itself was written to, which changes a mapping of it.
        """
        try:
            now = FileIdentity.of(self.path)
        except QuantError:
            return "deleted"
        if (now.device, now.inode) != (self.device, self.inode):
            return "replaced by another"
        self.check_unchanged()
        return None
