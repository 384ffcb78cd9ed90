"""Files that are read piece by piece with plain reads, never mapped, and hashed on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import QuantError
from ..gguf.header import FileIdentity

_HASH_CHUNK_BYTES = 16 << 20


class HashedFile:
    """A file read at any offset; the bytes that are reached in order also feed one SHA-256 of the whole file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.identity = FileIdentity.of(path)
        try:
            self._file = open(path, "rb")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise QuantError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
        self._hash = hashlib.sha256()
        self._hashed = 0
        self.hashes = True
        """Off: reading ahead does not hash, and so read, all that lies before."""

    def read(self, offset: int, nbytes: int) -> Tensor:
        """uint8 (nbytes,), a fresh tensor."""
        if not self.hashes:
            return self.peek(offset, nbytes)
        if offset > self._hashed:
            self._hash_until(offset)
        data = self.peek(offset, nbytes)
        new = max(0, offset + nbytes - self._hashed)
        self._hash.update(data[nbytes - new :].numpy().data)
        self._hashed += new
        return data

    def peek(self, offset: int, nbytes: int) -> Tensor:
        """`read` for small things out of order: does not hash what lies before."""
        data = torch.empty(nbytes, dtype=torch.uint8)
        self._file.seek(offset)
        if self._file.readinto(data.numpy().data) != nbytes:
            raise QuantError(f"{self.path}: ends before byte {offset + nbytes}; the file changed while it was read")
        return data

    def sha256(self) -> str:
        """Hex digest of the whole file; reads what was not read yet."""
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
    """All files of one source."""

    parts: Sequence[HashedFile]

    def sha256(self) -> str:
        """Hex digest of the file; of the files' digests, in order, where there are several."""
        digests = [part.sha256() for part in self.parts]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    @contextmanager
    def glancing(self) -> Iterator[None]:
        """For reading here and there before the files are read in order."""
        for part in self.parts:
            part.hashes = False
        try:
            yield
        finally:
            for part in self.parts:
                part.hashes = True

    def close(self) -> None:
        for part in self.parts:
            part.close()


@dataclass(frozen=True)
class SourceIdentity:
    """What tells that a source is still the one that was opened."""

    path: Path
    parts: tuple[FileIdentity, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(part.size for part in self.parts)

    @property
    def mtime_ns(self) -> int:
        """That of the file changed last."""
        return max(part.mtime_ns for part in self.parts)

    def check_unchanged(self) -> None:
        for part in self.parts:
            part.check_unchanged()
