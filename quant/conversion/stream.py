"""One pass over a checkpoint that quantizes it into one or more GGUF files.

Reading and writing run on one thread each, so that they overlap with quantization.
"""

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
from ..squares import sum_of_squares
from .layer_encoder import LayerEncoder
from .settings import Settings

# The size of a slice bounds its float32 temporaries and the time between two progress reports. Accelerators get larger
# slices because they prefer few launches.
_SLICE_ELEMENTS = {"cpu": 1 << 20}
_SLICE_ELEMENTS_DEFAULT = 1 << 23
_UNSUSPICIOUS = torch.finfo(torch.float16).max ** 2
"""A squared error that a slice within the range of every type may have; types have factors in float16."""


class Slice(NamedTuple):
    """Consecutive rows of a tensor."""

    tensor: SourceTensor
    weight: Tensor
    """float32, (rows, in_features), on the device of the conversion."""
    packed: Tensor | None
    """uint8: the bytes that `weight` was dequantized from; None if the source does not store a ggml type."""
    is_last: bool


@dataclass
class OpenFile:
    """A file that is being written, and the squared error of its current tensor."""

    writer: GGUFWriter
    errors: list[float] = field(init=False)
    noise: float = 0.0
    _pending: Future[None] | None = None

    def __post_init__(self) -> None:
        self.errors = list(self.writer.recorded)
        self._kept = {spec.name for spec in self.writer.tensors[: len(self.errors)]}

    def holds(self, name: str) -> bool:
        """Return whether a killed conversion has already written this tensor."""
        return name in self._kept

    def quantize(self, part: Slice, qtype: QuantType, encoder: LayerEncoder, effort: Effort) -> Tensor:
        """Return the bytes of the slice, uint8 (rows, bytes per row): the source's own if it has the same type."""
        if part.packed is not None and part.tensor.stored == qtype.name:
            return part.packed
        packed = encoder.quantize(qtype, part.weight, effort)
        noise = qtype.dequantize(packed).sub_(part.weight).square_().sum().item()
        if not noise <= _UNSUSPICIOUS:
            noise = self._noise_within_range(part, qtype, packed)
        self.noise += noise
        return packed.cpu()

    def _noise_within_range(self, part: Slice, qtype: QuantType, packed: Tensor) -> float:
        """Return the squared error of a slice, and refuse values beyond the range of the type."""
        stored, largest = qtype.dequantize(packed), part.weight.abs().amax()
        # The fewer bits, the farther the nearest value may lie from a value within the range.
        tolerance = 2.0 ** (2 - min(8, max(3, int(qtype.bits_per_weight))))
        if not bool(stored.isfinite().all()) or stored.abs().amax() < (1 - tolerance) * largest:
            raise QuantError(
                f"{self.writer.path}: tensor {part.tensor.name}: the value {largest.item():g} is beyond the range of"
                f" {qtype.name}; choose a recipe that stores this tensor in BF16, such as BF16"
            )
        return sum_of_squares(stored.sub_(part.weight))

    def write(self, pool: ThreadPoolExecutor, name: str, packed: Tensor) -> None:
        """Write `packed`, uint8 of any shape, on the thread of the pool, after the previous write has finished."""
        self.wait()
        self._pending = pool.submit(self.writer.write_part, name, packed)

    def wait(self) -> None:
        """Wait for the last write, and raise its exception if it failed."""
        if self._pending is not None:
            self._pending.result()

    def end_tensor(self, pool: ThreadPoolExecutor, signal: float) -> None:
        """Record the relative error of the tensor whose sum of squares is `signal`."""
        self.errors.append(math.sqrt(self.noise / signal) if signal else 0.0)
        self.noise = 0.0
        self.wait()
        self._pending = pool.submit(self.writer.record, self.errors[-1])


@dataclass
class Stream:
    """One pass over a source."""

    checkpoint: Checkpoint
    settings: Settings
    device: torch.device
    progress: Progress | None
    done_bytes: int = 0

    @property
    def importance(self) -> Mapping[str, Tensor]:
        """The importance of the settings: float32, (in_features,), by the name of the weight; empty without one."""
        return self.settings.importance or {}

    def write(self, writers: Iterable[GGUFWriter]) -> list[Path]:
        """Write all tensors to all files, and return the paths of the files."""
        with ExitStack() as stack:
            files = [OpenFile(stack.enter_context(writer)) for writer in writers]
            # The pool is entered last and left first, so that its thread never writes to a file that is being closed.
            pool = stack.enter_context(ThreadPoolExecutor(1))
            self._quantize(files, pool)
            self.checkpoint.identity.check_unchanged()
            sha256 = self.checkpoint.files.sha256()
            return [file.writer.close(_final_metadata(file, sha256)) for file in files]

    def is_within_f16(self, tensor: SourceTensor) -> bool:
        """Return whether all values are within the range of F16; NaN is not."""
        largest = torch.finfo(torch.float16).max
        for part in self.slices([tensor]):
            self.advance(tensor, 0)
            if not part.weight.abs().amax() <= largest:
                return False
        return True

    def slices(self, tensors: Iterable[SourceTensor]) -> Generator[Slice, None, None]:
        """Yield all rows in order; the next slice is read while the caller works on one."""
        with ThreadPoolExecutor(1) as pool:
            ahead: Future[Slice] | None = None
            for tensor, start, stop in self._ranges(tensors):
                following = pool.submit(self._read, tensor, start, stop)
                if ahead is not None:
                    yield ahead.result()
                ahead = following
            if ahead is not None:
                yield ahead.result()

    def advance(self, tensor: SourceTensor, nbytes: int) -> None:
        """Count `nbytes` more source bytes as done, and report the progress."""
        self.done_bytes += nbytes
        if self.progress is not None:
            self.progress(self.done_bytes, self.checkpoint.nbytes, tensor.name)

    def _quantize(self, files: list[OpenFile], pool: ThreadPoolExecutor) -> None:
        specs = [{spec.name: spec.qtype for spec in file.writer.tensors} for file in files]
        signal = 0.0
        encoder_of = lru_cache(1)(self._encoder_of)  # all slices of a tensor share one encoder
        missing = []
        for tensor in self.checkpoint.tensors.values():
            if all(file.holds(tensor.name) for file in files):
                self.advance(tensor, tensor.nbytes)
            else:
                missing.append(tensor)
        with closing(self.slices(missing)) as slices:
            for part in slices:
                name = part.tensor.name
                signal += self._sum_of_squares(part)
                for file, types in zip(files, specs, strict=True):
                    if file.holds(name):
                        continue
                    file.write(pool, name, file.quantize(part, types[name], encoder_of(name), self.settings.effort))
                    if part.is_last:
                        file.end_tensor(pool, signal)
                signal = 0.0 if part.is_last else signal
                self.advance(part.tensor, part.weight.numel() * part.tensor.dtype.itemsize)
        for file in files:
            file.wait()

    def _encoder_of(self, name: str) -> LayerEncoder:
        return LayerEncoder.of(self.importance, name).to(self.device)

    def _sum_of_squares(self, part: Slice) -> float:
        signal = sum_of_squares(part.weight)
        if not math.isfinite(signal):
            raise QuantError(
                f"{self.checkpoint.path}: tensor {part.tensor.name}: holds NaN or infinity, expected finite"
                " numbers; download the file again, or allow these values (--allow-non-finite) to write 0 instead"
            )
        return signal

    def _ranges(self, tensors: Iterable[SourceTensor]) -> Iterator[tuple[SourceTensor, int, int]]:
        """Yield the first row of each slice and the row behind its last one."""
        for tensor in tensors:
            in_features = tensor.shape[-1]
            rows = math.prod(tensor.shape) // in_features
            step = max(1, _SLICE_ELEMENTS.get(self.device.type, _SLICE_ELEMENTS_DEFAULT) // in_features)
            for start in range(0, rows, step):
                yield tensor, start, min(start + step, rows)

    def _read(self, tensor: SourceTensor, start: int, stop: int) -> Slice:
        in_features = tensor.shape[-1]
        first, last = start * in_features, stop * in_features
        weight = tensor.read(first, last).to(self.device).float().view(-1, in_features)
        return Slice(tensor, weight, tensor.read_packed(first, last), last == math.prod(tensor.shape))


def _final_metadata(file: OpenFile, sha256: str) -> dict[str, Any]:
    errors = np.array(file.errors, np.float32)
    return {RELATIVE_ERROR: errors, SOURCE_SHA256: sha256, DATA_SHA256: file.writer.sha256}
