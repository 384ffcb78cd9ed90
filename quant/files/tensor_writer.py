"""TensorWriter, which writes a file tensor by tensor; the destination appears complete or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ..errors import PrintableLog, QuantError
from .atomic_file import AtomicFile
from .journal import Journal, JournalEntry, journal_of

_log = PrintableLog(__name__)

_READ_BYTES = 16 << 20


class Spec(Protocol):
    """A tensor to be written."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...


SpecT = TypeVar("SpecT", bound=Spec)
SpecT_co = TypeVar("SpecT_co", bound=Spec, covariant=True)


class Layout(Protocol[SpecT_co]):
    """The header of a file and the places of its tensors, known before anything is written."""

    @property
    def path(self) -> Path: ...
    @property
    def tensors(self) -> Sequence[SpecT_co]: ...
    @property
    def header(self) -> bytes: ...
    @property
    def nbytes(self) -> int: ...

    def header_with(self, metadata: Mapping[str, Any]) -> bytes:
        """Return the header with new values, each as long in the file as the value that it replaces."""

    def padded(self, nbytes: int) -> int:
        """Return `nbytes` rounded up to the alignment of the file."""


class TensorWriter(Generic[SpecT]):
    """A context manager that writes the declared tensors in their order.

    Leaving the `with` block normally closes the writer. Leaving it by an exception removes what was written, unless
    `keep` is on. If the process is killed, the tensors for which `record` was called stay on the disk, in a file beside
    `path`.

    Args:
        resume: keep the tensors that a stopped writer of the same metadata and tensors recorded. `recorded` then has
            their relative errors, and only the tensors after them are to be written.
        keep: an exception leaves what a killed process would.
        ending: the bytes of the last tensor, which `end` adds; empty without one.

    Raises:
        QuantError: on entering, what `AtomicFile` raises.
    """

    def __init__(
        self,
        layout: Layout[SpecT],
        *,
        overwrite: bool = False,
        resume: bool = False,
        keep: bool = False,
        ending: bytes = b"",
    ) -> None:
        self._layout, self._ending = layout, ending
        self.path, self.tensors = layout.path, tuple(layout.tensors)
        self.nbytes = self._layout.nbytes
        """The size of the finished file in bytes."""
        self.recorded: list[float] = []
        self._file = AtomicFile(self.path, self.nbytes, overwrite=overwrite, resume=resume, keep=keep)
        self._keep = keep
        self._journal = Journal(journal_of(self.path))
        self._digest = hashlib.sha256()
        self._n_written = self._n_bytes = 0
        self._is_closed = False

    def __enter__(self) -> TensorWriter[SpecT]:
        self._journal.check()
        with ExitStack() as stack:
            stack.enter_context(self._file)
            stack.callback(self._journal.delete)
            self._resume()
            stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None and not self._is_closed:
                self.close()
        finally:
            if self._is_closed or not self._keep:
                self._journal.delete()
            self._file.__exit__(kind, error, traceback)

    @property
    def keeps(self) -> bool:
        """True if an exception leaves what a killed process would."""
        return self._keep

    def discard(self) -> None:
        """Keep nothing when the `with` block is left by an exception."""
        self._keep = self._file.keep = False

    def end(self) -> None:
        """Add the ending, if all other tensors are written; once."""
        if self._ending and self._n_written == len(self.tensors) - 1:
            self._append(self._ending)
            self._n_written += 1

    @property
    def sha256(self) -> str:
        """The SHA-256 of everything that is written after the header, in hexadecimal."""
        return self._digest.hexdigest()

    def write(self, name: str, packed: Tensor) -> None:
        """Append the next declared tensor.

        Args:
            packed: uint8, on any device, of any shape with the number of bytes of the declared tensor.
        """
        spec = self._next(name)
        if self._n_bytes or packed.numel() != spec.nbytes:
            raise self._misfit(spec, packed)
        self.write_part(name, packed)

    def write_part(self, name: str, packed: Tensor) -> None:
        """Append bytes of the next declared tensor, which is complete once all of its bytes are written.

        Args:
            packed: uint8, on any device, of any shape.
        """
        spec = self._next(name)
        self._n_bytes += packed.numel()
        if packed.dtype != torch.uint8 or self._n_bytes > spec.nbytes:
            raise self._misfit(spec, packed)
        self._append(packed.cpu().contiguous().numpy().data)
        if self._n_bytes == spec.nbytes:
            self._append(bytes(self._layout.padded(spec.nbytes) - spec.nbytes))
            self._n_written, self._n_bytes = self._n_written + 1, 0

    def record(self, relative_error: float, *, with_next: bool = False) -> None:
        """Record the tensor just completed, so that it survives if this process is killed.

        Args:
            with_next: whether it only survives together with the next tensor, which cannot be made without it.
        """
        self._file.flush()
        self._journal.append(JournalEntry(relative_error, self.sha256, with_next))

    def close(self, metadata: Mapping[str, Any] | None = None) -> Path:
        """Move the complete file to its path.

        Args:
            metadata: new values for declared keys, each as long in the file as the value that it replaces.

        Returns:
            The path of the file, which can differ from the requested one: see `AtomicFile.commit`.
        """
        self.end()
        if self._n_written < len(self.tensors):
            raise QuantError(
                f"{self.path}: {self._n_written} of {len(self.tensors)} tensors are written; write all before closing"
            )
        if metadata:
            self._file.rewind()
            self._file.write(self._layout.header_with(metadata))
        self._is_closed = True
        return self._file.commit()

    def _append(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._digest.update(content)

    def _resume(self) -> None:
        """Keep the tensors that a stopped writer recorded, up to the first whose bytes are not those recorded."""
        header, size = self._file.read(len(self._layout.header)), len(self._layout.header)
        kept: list[JournalEntry] = []
        if header == self._layout.header:
            digest, end, same = self._digest.copy(), size, []
            for entry, spec in zip(self._journal.read(), self.tensors, strict=False):
                for start in range(0, self._layout.padded(spec.nbytes), _READ_BYTES):
                    digest.update(self._file.read(min(_READ_BYTES, self._layout.padded(spec.nbytes) - start)))
                if digest.hexdigest() != entry.sha256:
                    break
                end += self._layout.padded(spec.nbytes)
                same.append(entry)
                if not entry.with_next:
                    self._digest, size, kept = digest.copy(), end, list(same)
            _log.warning("%s: resumed after %d of %d tensors", self.path, len(kept), len(self.tensors))
        elif header:
            _log.warning(
                "%s: the unfinished file there has another source, recipe or version; starting anew",
                self.path,
            )
        self.recorded, self._n_written = [entry.relative_error for entry in kept], len(kept)
        if kept:
            self._journal.restart(kept)
            self._file.restart(size)
        else:
            self._journal.delete()
            self._file.restart(0)
            self._file.write(self._layout.header)

    def _next(self, name: str) -> SpecT:
        spec = self.tensors[self._n_written] if self._n_written < len(self.tensors) else None
        if spec is None or spec.name != name:
            expected = spec.name if spec else "no more tensors"
            raise QuantError(f"{self.path}: got tensor {name}, expected {expected}; write in the declared order")
        return spec

    def _misfit(self, spec: SpecT, packed: Tensor) -> QuantError:
        return QuantError(
            f"{self.path}: tensor {spec.name}: {packed.numel()} elements of {packed.dtype}, expected {spec.nbytes} of"
            f" torch.uint8; give the bytes of a tensor of shape {spec.shape}"
        )
