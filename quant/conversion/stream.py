"""One pass over a checkpoint that quantizes it into one or more GGUF files.

Reading and writing run on one thread each, so that they overlap with quantization.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..device import elements_at_a_time
from ..errors import QuantError
from ..files.tensor_writer import TensorWriter
from ..gguf.provenance import DATA_SHA256, RELATIVE_ERROR, SOURCE_SHA256
from ..native.layer_type import LayerType
from ..native.native_format import ROUNDED_ELEMENTS
from ..plan.recipe import StoredType
from ..progress import Progress
from ..qtype import Effort
from ..sources.checkpoint import Checkpoint, SourceTensor
from ..sources.tensors import sample_rows
from ..squares import sum_of_squares, total_of
from ..statistics.calibration import Calibration
from .bias_correction import mean_error
from .layer_encoder import LayerEncoder, LayerEncoders
from .settings import Settings

# The size of a slice bounds its float32 temporaries and the time between two progress reports. Accelerators get larger
# slices because they prefer few launches.
_CPU_SLICE, _DEVICE_SLICE = 1 << 20, 1 << 23
_TRIED_ROWS = 32
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
    tried: Tensor | None = None
    """float32, (rows, in_features): rows of the whole tensor to try its encoder on; only in the first slice."""


@dataclass
class OpenFile:
    """A file that is being written, and the errors of its current tensor."""

    writer: TensorWriter[Any]
    errors: list[float] = field(init=False)
    noise: float = 0.0
    mean_errors: list[Tensor] = field(default_factory=list)
    """float32 (rows,) each: by how much the outputs of the last weight are off on average."""
    _pending: Future[None] | None = None

    def __post_init__(self) -> None:
        self.errors = list(self.writer.recorded)
        self._kept = {spec.name for spec in self.writer.tensors[: len(self.errors)]}

    def holds(self, name: str) -> bool:
        """Return whether a killed conversion has already written this tensor."""
        return name in self._kept

    def quantize(self, part: Slice, qtype: StoredType, encoder: LayerEncoder, effort: Effort) -> Tensor:
        """Return the bytes of the slice, uint8 (rows, bytes per row): the source's own if it has the same type."""
        if part.packed is not None and part.tensor.stored == qtype.name:
            return part.packed
        packed = encoder.quantize(qtype, part.weight, effort)
        error = qtype.dequantize(packed).sub_(part.weight)
        if encoder.mean is not None:
            self.mean_errors.append(mean_error(error, encoder.mean))
        self._count(error, part, qtype, packed)
        return packed.cpu()

    def correct(self, part: Slice, qtype: StoredType) -> Tensor:
        """Return the bytes of a bias less the mean error of the outputs of its weight, uint8 (1, bytes)."""
        weight = part.weight
        if self.mean_errors:  # not if the weight's bytes are the source's
            weight = weight - torch.cat(self.mean_errors).view_as(weight)
        self.mean_errors = []
        packed = qtype.quantize(weight)
        self._count(qtype.dequantize(packed).sub_(part.weight), part, qtype, packed)
        return packed.cpu()

    def _count(self, error: Tensor, part: Slice, qtype: StoredType, packed: Tensor) -> None:
        """Add the squared error of a slice."""
        noise = total_of(error.square_())
        self.noise += noise if noise <= _UNSUSPICIOUS else self._noise_within_range(part, qtype, packed)

    def _noise_within_range(self, part: Slice, qtype: StoredType, packed: Tensor) -> float:
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
        """Record the relative error of the tensor whose sum of squares is `signal`.

        A weight is recorded together with its bias, which cannot be corrected without it.
        """
        self.errors.append(math.sqrt(self.noise / signal) if signal else 0.0)
        self.noise = 0.0
        self.wait()
        self._pending = pool.submit(self.writer.record, self.errors[-1], with_next=bool(self.mean_errors))


@dataclass
class Stream:
    """One pass over a source."""

    checkpoint: Checkpoint
    settings: Settings
    device: torch.device
    progress: Progress | None
    biases: Mapping[str, str] = field(default_factory=dict)
    """The biases that are corrected, by the names of their weights, which they follow: see `bias_correction`."""
    done_bytes: int = 0
    _whole: set[str] = field(default_factory=set)
    """The names of the weights that are encoded at once, because parts of a native format describe the whole weight."""

    def __post_init__(self) -> None:
        self.encoders = LayerEncoders(self.importance, self.biases, self.device, self.settings.effort)

    @property
    def importance(self) -> Mapping[str, Tensor]:
        """The importance of the settings: float32, (in_features,), by the name of the weight; empty without one."""
        return self.settings.importance or {}

    def write(self, writers: Iterable[TensorWriter[Any]]) -> list[Path]:
        """Write all tensors to all files, and return the paths of the files."""
        with ExitStack() as stack:
            files = [OpenFile(stack.enter_context(writer)) for writer in writers]
            # The pool is entered last and left first, so that its thread never writes to a file that is being closed.
            pool = stack.enter_context(ThreadPoolExecutor(1))
            self._quantize(files, pool)
            self.checkpoint.identity.check_unchanged()
            sha256 = self.checkpoint.files.sha256()
            for file in files:
                file.writer.end()
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
        self._whole = {name for types in specs for name, stored in types.items() if isinstance(stored, LayerType)}
        signal = 0.0
        corrected, missing = set(self.biases.values()), []
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
                    if name in corrected:
                        packed = file.correct(part, types[name])
                    else:
                        encoder = self.encoders.of(name, types[name], part.tried)
                        packed = file.quantize(part, types[name], encoder, self.settings.effort)
                    file.write(pool, name, packed)
                    if part.is_last:
                        file.end_tensor(pool, signal)
                signal = 0.0 if part.is_last else signal
                self.advance(part.tensor, part.weight.numel() * part.tensor.dtype.itemsize)
        for file in files:
            file.wait()

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
            step = rows if tensor.name in self._whole else max(1, self._slice_elements(tensor.name) // in_features)
            for start in range(0, rows, step):
                yield tensor, start, min(start + step, rows)

    def _slice_elements(self, name: str) -> int:
        n_elements = _CPU_SLICE if self.device.type == "cpu" else max(_DEVICE_SLICE, elements_at_a_time(self.device))
        is_rounded = isinstance(self.importance, Calibration) and name in self.importance
        return max(n_elements, ROUNDED_ELEMENTS) if is_rounded else n_elements

    def _read(self, tensor: SourceTensor, start: int, stop: int) -> Slice:
        in_features = tensor.shape[-1]
        first, last = start * in_features, stop * in_features
        tried = None
        if start == 0 and isinstance(self.importance, Calibration) and tensor.name in self.importance.held_out:
            with self.checkpoint.files.without_hashing():
                tried = sample_rows(tensor, _TRIED_ROWS).to(self.device)
        weight = self._weight(tensor, first, last).to(self.device).float().view(-1, in_features)
        return Slice(tensor, weight, tensor.read_packed(first, last), last == math.prod(tensor.shape), tried)

    def _weight(self, tensor: SourceTensor, first: int, last: int) -> Tensor:
        """Return elements of a tensor as they are stored."""
        if tensor.name not in self.biases.values():
            return tensor.read(first, last)
        with self.checkpoint.files.without_hashing():  # they are read out of order
            return tensor.read(first, last)


def _final_metadata(file: OpenFile, sha256: str) -> dict[str, Any]:
    errors = np.array(file.errors, np.float32)
    return {RELATIVE_ERROR: errors, SOURCE_SHA256: sha256, DATA_SHA256: file.writer.sha256}
