"""GGUFWriter: writes GGUF files tensor by tensor; the destination appears complete or not at all."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..errors import QuantError
from ..files.atomic_file import AtomicFile
from ..files.journal import Journal, JournalEntry
from .layout import FileLayout, TensorSpec

_log = logging.getLogger(__name__)

_READ_BYTES = 16 << 20


class GGUFWriter:
    """A context manager that writes declared tensors in their order.

    Leaving the `with` block normally closes the writer; leaving it by any exception leaves nothing on disk. If the
    process is killed instead, the tensors given to `record` stay beside `path`. With `resume`, the next writer of the
    same metadata and tensors keeps them: `recorded` has their relative errors, and only the others are to be written.

    Args:
        five_d: see `FileLayout`.

    Raises:
        QuantError: names, shapes or metadata cannot be stored; on entering, what `AtomicFile` raises.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        metadata: Mapping[str, Any],
        tensors: Sequence[TensorSpec],
        *,
        overwrite: bool = False,
        five_d: bool = False,
        resume: bool = False,
    ) -> None:
        self._layout = FileLayout(path, metadata, tensors, five_d=five_d)
        self.path, self.tensors = self._layout.path, self._layout.tensors
        self.nbytes = self._layout.nbytes
        """Size of the finished file."""
        self.recorded: list[float] = []
        self._file = AtomicFile(self.path, self.nbytes, overwrite=overwrite, resume=resume)
        self._journal = Journal(self.path.with_name(f".{self.path.name}.journal"))
        self._digest = hashlib.sha256()
        self._n_written = self._n_bytes = 0
        self._is_closed = False

    def __enter__(self) -> GGUFWriter:
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
            self._journal.delete()
            self._file.__exit__(kind, error, traceback)

    @property
    def sha256(self) -> str:
        """Hex digest of all that is written behind the header."""
        return self._digest.hexdigest()

    def write(self, name: str, packed: Tensor) -> None:
        """Appends the next declared tensor.

        Args:
            packed: uint8, on any device, as many bytes as the declared shape takes in its type.
        """
        spec = self._next(name)
        if self._n_bytes or packed.numel() != spec.nbytes:
            raise self._misfit(spec, packed)
        self.write_part(name, packed)

    def write_part(self, name: str, packed: Tensor) -> None:
        """Appends bytes of the next declared tensor, which is complete once all of its bytes are there."""
        spec = self._next(name)
        self._n_bytes += packed.numel()
        if packed.dtype != torch.uint8 or self._n_bytes > spec.nbytes:
            raise self._misfit(spec, packed)
        self._append(packed.cpu().contiguous().numpy().data)
        if self._n_bytes == spec.nbytes:
            self._append(bytes(self._layout.padded(spec.nbytes) - spec.nbytes))
            self._n_written, self._n_bytes = self._n_written + 1, 0

    def record(self, relative_error: float) -> None:
        """Makes the tensor just completed survive a kill of this process."""
        self._file.flush()
        self._journal.append(JournalEntry(relative_error, self.sha256))

    def close(self, metadata: Mapping[str, Any] | None = None) -> Path:
        """Puts the complete file in place.

        Args:
            metadata: new values for declared keys, each as long in the file as the one it replaces.

        Returns:
            The file's path, which can differ from the one asked for: see `AtomicFile.commit`.
        """
        if self._n_written < len(self.tensors):
            raise QuantError(f"{self.path}: {self._n_written} of {len(self.tensors)} tensors written; write all first")
        if metadata:
            self._file.rewind()
            self._file.write(self._layout.header_with(metadata))
        self._is_closed = True
        return self._file.commit()

    def _append(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._digest.update(content)

    def _resume(self) -> None:
        """Keeps the tensors that a killed writer recorded, as far as they are in the file as recorded."""
        header, kept, size = self._file.read(len(self._layout.header)), [], len(self._layout.header)
        if header == self._layout.header:
            for entry, spec in zip(self._journal.read(), self.tensors, strict=False):
                digest = self._digest.copy()
                for start in range(0, self._layout.padded(spec.nbytes), _READ_BYTES):
                    digest.update(self._file.read(min(_READ_BYTES, self._layout.padded(spec.nbytes) - start)))
                if digest.hexdigest() != entry.sha256:
                    break
                self._digest, size = digest, size + self._layout.padded(spec.nbytes)
                kept.append(entry)
            _log.warning("%s: resumed after %d of %d tensors", self.path, len(kept), len(self.tensors))
        elif header:
            _log.warning("%s: a killed job left another source's, recipe's or version's; starting anew", self.path)
        self.recorded, self._n_written = [entry.relative_error for entry in kept], len(kept)
        if kept:
            self._journal.restart(kept)
            self._file.restart(size)
        else:
            self._journal.delete()
            self._file.restart(0)
            self._file.write(self._layout.header)

    def _next(self, name: str) -> TensorSpec:
        spec = self.tensors[self._n_written] if self._n_written < len(self.tensors) else None
        if spec is None or spec.name != name:
            expected = spec.name if spec else "no more"
            raise QuantError(f"{self.path}: got tensor {name}, expected {expected}; keep the declared order")
        return spec

    def _misfit(self, spec: TensorSpec, packed: Tensor) -> QuantError:
        return QuantError(
            f"{self.path}: tensor {spec.name}: {packed.numel()} items of {packed.dtype}, expected {spec.nbytes} bytes"
            f" as torch.uint8; quantize it to {spec.qtype.name} {spec.shape}"
        )
