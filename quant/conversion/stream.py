"""Encodes a checkpoint into one or more GGUF files in one pass; reading, encoding and writing overlap."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import QuantError
from ..gguf.provenance import DATA_SHA256, RELATIVE_ERROR, SOURCE_SHA256
from ..gguf.writer import GGUFWriter
from ..progress import Progress
from ..qtype import Effort, QuantType
from ..sources.checkpoint import Checkpoint, SourceTensor
from .layer_encoder import Inputs
from .settings import Settings

# Bounds the float32 temporaries of a slice and the time between two reports; accelerators prefer few launches.
_SLICE_ELEMENTS = {"cpu": 1 << 20}
_SLICE_ELEMENTS_DEFAULT = 1 << 23


class Slice(NamedTuple):
    """Rows of a tensor."""

    tensor: SourceTensor
    weight: Tensor
    """(rows, columns) float32, on the device."""
    packed: Tensor | None
    """The bytes that they were decoded from, where the source stores them in a ggml type."""
    is_last: bool


@dataclass
class OpenFile:
    """A file being written, and the squared error of its current tensor."""

    writer: GGUFWriter
    errors: list[float] = field(init=False)
    noise: float = 0.0
    _pending: Future[None] | None = None

    def __post_init__(self) -> None:
        self.errors = list(self.writer.recorded)
        self._kept = {spec.name for spec in self.writer.tensors[: len(self.errors)]}

    def holds(self, name: str) -> bool:
        """Return whether a killed conversion wrote this tensor already."""
        return name in self._kept

    def encode(self, part: Slice, qtype: QuantType, inputs: Inputs, effort: Effort) -> Tensor:
        """Bytes of the slice: those of the source where it has the type already."""
        if part.packed is not None and part.tensor.stored == qtype.name:
            return part.packed
        packed = inputs.quantize(qtype, part.weight, effort)
        self.noise += qtype.dequantize(packed).sub_(part.weight).square_().sum().item()
        return packed.cpu()

    def write(self, pool: ThreadPoolExecutor, name: str, packed: Tensor) -> None:
        """Writes on the pool's thread, once what was written before is done."""
        self.wait()
        self._pending = pool.submit(self.writer.write_part, name, packed)

    def wait(self) -> None:
        """Raises what the last write raised."""
        if self._pending is not None:
            self._pending.result()

    def end_tensor(self, pool: ThreadPoolExecutor, signal: float) -> None:
        self.errors.append(math.sqrt(self.noise / signal) if signal else 0.0)
        self.noise = 0.0
        self.wait()
        self._pending = pool.submit(self.writer.record, self.errors[-1])


@dataclass
class Stream:
    """One source on its way through the encoders."""

    checkpoint: Checkpoint
    settings: Settings
    device: torch.device
    progress: Progress | None
    done_bytes: int = 0

    @property
    def importance(self) -> Mapping[str, Tensor]:
        return self.settings.importance or {}

    def write(self, writers: Iterable[GGUFWriter]) -> list[Path]:
        """Writes all tensors to all files; returns the paths that these got."""
        with ExitStack() as stack:
            files = [OpenFile(stack.enter_context(writer)) for writer in writers]
            # Entered last, so left first: no thread writes to a file that is being closed.
            pool = stack.enter_context(ThreadPoolExecutor(1))
            self._encode(files, pool)
            self.checkpoint.identity.check_unchanged()
            sha256 = self.checkpoint.files.sha256()
            return [file.writer.close(_final_metadata(file, sha256)) for file in files]

    def fits_f16(self, tensor: SourceTensor) -> bool:
        largest = torch.finfo(torch.float16).max
        for part in self.slices([tensor]):
            self.report(tensor, 0)
            if not part.weight.abs().amax() <= largest:
                return False
        return True

    def slices(self, tensors: Iterable[SourceTensor]) -> Generator[Slice, None, None]:
        """All rows in order; the next slice is read while the caller works on one."""
        with ThreadPoolExecutor(1) as pool:
            ahead: Future[Slice] | None = None
            for tensor, start, stop in self._ranges(tensors):
                following = pool.submit(self._read, tensor, start, stop)
                if ahead is not None:
                    yield ahead.result()
                ahead = following
            if ahead is not None:
                yield ahead.result()

    def report(self, tensor: SourceTensor, nbytes: int) -> None:
        self.done_bytes += nbytes
        if self.progress is not None:
            self.progress(self.done_bytes, self.checkpoint.nbytes, tensor.name)

    def _encode(self, files: list[OpenFile], pool: ThreadPoolExecutor) -> None:
        specs = [{spec.name: spec.qtype for spec in file.writer.tensors} for file in files]
        signal = 0.0
        inputs_of = lru_cache(1)(self._inputs_of)  # of the tensor at hand, for all its slices
        missing = []
        for tensor in self.checkpoint.tensors.values():
            if all(file.holds(tensor.name) for file in files):
                self.report(tensor, tensor.nbytes)
            else:
                missing.append(tensor)
        with closing(self.slices(missing)) as slices:
            for part in slices:
                name = part.tensor.name
                signal += self._energy(part)
                for file, types in zip(files, specs, strict=True):
                    if file.holds(name):
                        continue
                    file.write(pool, name, file.encode(part, types[name], inputs_of(name), self.settings.effort))
                    if part.is_last:
                        file.end_tensor(pool, signal)
                signal = 0.0 if part.is_last else signal
                self.report(part.tensor, part.weight.numel() * part.tensor.dtype.itemsize)
        for file in files:
            file.wait()

    def _inputs_of(self, name: str) -> Inputs:
        return Inputs.of(self.importance, name).to(self.device)

    def _energy(self, part: Slice) -> float:
        energy = part.weight.square().sum().item()
        if not math.isfinite(energy):
            raise QuantError(
                f"{self.checkpoint.path}: tensor {part.tensor.name}: holds NaN or infinity;"
                " download the file again, or allow these (--allow-non-finite) to write 0 instead"
            )
        return energy

    def _ranges(self, tensors: Iterable[SourceTensor]) -> Iterator[tuple[SourceTensor, int, int]]:
        """Rows of each slice."""
        for tensor in tensors:
            columns = tensor.shape[-1]
            rows = math.prod(tensor.shape) // columns
            step = max(1, _SLICE_ELEMENTS.get(self.device.type, _SLICE_ELEMENTS_DEFAULT) // columns)
            for start in range(0, rows, step):
                yield tensor, start, min(start + step, rows)

    def _read(self, tensor: SourceTensor, start: int, stop: int) -> Slice:
        columns = tensor.shape[-1]
        first, last = start * columns, stop * columns
        weight = tensor.read(first, last).to(self.device).float().view(-1, columns)
        return Slice(tensor, weight, tensor.read_packed(first, last), last == math.prod(tensor.shape))


def _final_metadata(file: OpenFile, sha256: str) -> dict[str, Any]:
    errors = np.array(file.errors, np.float32)
    return {RELATIVE_ERROR: errors, SOURCE_SHA256: sha256, DATA_SHA256: file.writer.sha256}
