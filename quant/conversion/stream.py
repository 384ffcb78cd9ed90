"""One pass over a checkpoint that quantizes it into one or more GGUF files.

Reading and writing run on one thread each, so that they overlap with quantization.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..device import elements_at_a_time
from ..errors import QuantError
from ..files.tensor_writer import TensorWriter
from ..native.layer_type import LayerType
from ..native.native_format import ROUNDED_ELEMENTS
from ..progress import Progress
from ..sources.checkpoint import Checkpoint, SourceTensor
from ..sources.tensors import sample_rows
from ..squares import sum_of_squares
from ..statistics.calibration import Calibration
from .layer_encoder import LayerEncoders
from .open_file import OpenFile, OpenFiles, Slice
from .settings import Settings

# The size of a slice bounds its float32 temporaries and the time between two progress reports. Accelerators get larger
# slices because they prefer few launches.
_CPU_SLICE, _DEVICE_SLICE = 1 << 20, 1 << 23
_TRIED_ROWS = 32


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

    def write(self, writers: Iterable[TensorWriter[Any]], *, apart: bool = False) -> list[Path | QuantError]:
        """Write all tensors to all files.

        Args:
            apart: a file that fails is given up, and the others go on; otherwise all of them are.

        Returns:
            The path of each file, or why it was given up.
        """
        files = OpenFiles([OpenFile(writer) for writer in writers], apart)
        with ExitStack() as stack:
            files.each(stack.enter_context)
            # The pool is entered last and left first, so that its thread never writes to a file that is being closed.
            pool = stack.enter_context(ThreadPoolExecutor(1))
            self._quantize(files, pool)
            self.checkpoint.identity.check_unchanged()
            sha256 = self.checkpoint.files.sha256()
            files.each(lambda file: file.writer.end())
            files.each(lambda file: file.close(sha256))
        return [file.result for file in files.files]

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
                    yield self._on_device(ahead.result())
                ahead = following
            if ahead is not None:
                yield self._on_device(ahead.result())

    def advance(self, tensor: SourceTensor, nbytes: int) -> None:
        """Count `nbytes` more source bytes as done, and report the progress."""
        self.done_bytes += nbytes
        if self.progress is not None:
            self.progress(self.done_bytes, self.checkpoint.nbytes, tensor.name)

    def _quantize(self, files: OpenFiles, pool: ThreadPoolExecutor) -> None:
        stored = [spec for file in files.files for spec in file.writer.tensors]
        self._whole = {spec.name for spec in stored if isinstance(spec.qtype, LayerType)}
        signal = 0.0
        corrected, missing = set(self.biases.values()), []
        for tensor in self.checkpoint.tensors.values():
            if all(file.holds(tensor.name) for file in files.files):
                self.advance(tensor, tensor.nbytes)
            else:
                missing.append(tensor)

        def encode(file: OpenFile, part: Slice) -> None:
            name = part.tensor.name
            if file.holds(name):
                return
            if name in corrected:
                packed = file.correct(part, file.types[name])
            else:
                encoder = self.encoders.of(name, file.types[name], part.tried)
                packed = file.quantize(part, file.types[name], encoder, self.settings.effort)
            file.write(pool, name, packed)
            if part.is_last:
                file.end_tensor(pool, signal)

        with closing(self.slices(missing)) as slices:
            for part in slices:
                signal += self._sum_of_squares(part)
                files.each(partial(encode, part=part))
                if files.are_given_up:
                    return
                signal = 0.0 if part.is_last else signal
                self.advance(part.tensor, part.weight.numel() * part.tensor.dtype.itemsize)
        files.each(OpenFile.wait)

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
        """Return rows in main memory, as they are stored or in float32."""
        in_features = tensor.shape[-1]
        first, last = start * in_features, stop * in_features
        tried = None
        if start == 0 and isinstance(self.importance, Calibration) and tensor.name in self.importance.held_out:
            with self.checkpoint.files.without_hashing():
                tried = sample_rows(tensor, _TRIED_ROWS)
        weight = self._weight(tensor, first, last).view(-1, in_features)
        if self.device.type == "cpu":  # here, while the caller works on another slice
            weight = weight.float()
        return Slice(tensor, weight, tensor.read_packed(first, last), last == math.prod(tensor.shape), tried)

    def _on_device(self, part: Slice) -> Slice:
        """Return a slice on the device, in float32.

        The thread that reads must not do this. ComfyUI's hook in CUDA's allocator can log, for which it waits for
        Python's lock while torch's allocator is locked. A thread that holds the one and waits for the other never ends.
        """
        tried = None if part.tried is None else part.tried.to(self.device)
        return part._replace(weight=part.weight.to(self.device).float(), tried=tried)

    def _weight(self, tensor: SourceTensor, first: int, last: int) -> Tensor:
        """Return elements of a tensor as they are stored."""
        if tensor.name not in self.biases.values():
            return tensor.read(first, last)
        with self.checkpoint.files.without_hashing():  # they are read out of order
            return tensor.read(first, last)
