"""Files that are read slice by slice, without mapping them into memory, and hashed at the same time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import QuantError
from ..files.regular_file import open_regular
from ..gguf.file_identity import FileIdentity

_HASH_CHUNK_BYTES = 16 << 20


class HashedFile:
    """A file that is read at any offset, and its SHA-256, which is computed as the reads advance through the file."""

    def __init__(self, path: Path, identity: FileIdentity | None = None) -> None:
        """Open the file.

        Args:
            path: the path of the file.
            identity: what the file was when its header was read, if that was before; it is compared at the end.
        """
        self.path = path
        self.identity = identity or FileIdentity.of(path)
        self._file = open_regular(path)
        self._hash = hashlib.sha256()
        self._hashed = 0
        self.is_hashing = True
        """True if a read also hashes, and therefore reads, everything in front of it."""

    def read(self, offset: int, nbytes: int) -> Tensor:
        """Return uint8, (nbytes,), a new tensor."""
        if not self.is_hashing:
            return self.peek(offset, nbytes)
        if offset > self._hashed:
            self._hash_until(offset)
        data = self.peek(offset, nbytes)
        new = max(0, offset + nbytes - self._hashed)
        self._hash.update(data[nbytes - new :].numpy().data)
        self._hashed += new
        return data

    def peek(self, offset: int, nbytes: int) -> Tensor:
        """Return uint8, (nbytes,), without hashing: for small reads out of order."""
        data = torch.empty(nbytes, dtype=torch.uint8)
        self._file.seek(offset)
        if self._file.readinto(data.numpy().data) != nbytes:
            raise QuantError(
                f"{self.path}: ends before byte {offset + nbytes}, because it was changed while it was open;"
                " try again when nothing writes to it"
            )
        return data

    def sha256(self) -> str:
        """Return the hex digest of the whole file; what was not hashed yet is read."""
        self._hash_until(self._file.seek(0, 2))
        return self._hash.hexdigest()

    def close(self) -> None:
        self._file.close()

    def _hash_until(self, offset: int) -> None:
        while self._hashed < offset:
            chunk = self.peek(self._hashed, min(offset - self._hashed, _HASH_CHUNK_BYTES))
            self._hash.update(chunk.numpy().data)
            self._hashed += len(chunk)


@dataclass(frozen=True)
class SourceFiles:
    """The files of one source."""

    parts: Sequence[HashedFile]

    def sha256(self) -> str:
        """Return the hex digest of the file; for several files, the digest of their concatenated hex digests."""
        digests = [part.sha256() for part in self.parts]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    @contextmanager
    def without_hashing(self) -> Iterator[None]:
        """Return a context in which reads do not hash, so that a read out of order reads nothing else."""
        for part in self.parts:
            part.is_hashing = False
        try:
            yield
        finally:
            for part in self.parts:
                part.is_hashing = True

    def close(self) -> None:
        for part in self.parts:
            part.close()


@dataclass(frozen=True)
class SourceIdentity:
    """The path, sizes and modification times of a source, to detect that it was changed."""

    path: Path
    parts: tuple[FileIdentity, ...]

    @property
    def size(self) -> int:
        """The bytes of all files."""
        return sum(part.size for part in self.parts)

    @property
    def mtime_ns(self) -> int:
        """The latest modification time of the files, in nanoseconds."""
        return max(part.mtime_ns for part in self.parts)

    @property
    def digest(self) -> str:
        """A SHA-256 of the name, size and modification time of every file; empty for a single file.

        The total size and the latest time alone do not change with a file whose replacement has its size and is older
        than another file.
        """
        if len(self.parts) < 2:
            return ""
        parts = "".join(f"{part.path.name}\0{part.size}\0{part.mtime_ns}\0" for part in self.parts)
        return hashlib.sha256(os.fsencode(parts)).hexdigest()

    def check_unchanged(self) -> None:
        """Raise QuantError if a file was changed since it was opened."""
        for part in self.parts:
            part.check_unchanged()
