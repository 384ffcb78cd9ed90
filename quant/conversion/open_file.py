"""Files that are being written in one pass over a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import PrintableLog, QuantError
from ..files.disk_space import temporary_of
from ..files.tensor_writer import TensorWriter
from ..gguf.provenance import DATA_SHA256, RELATIVE_ERROR, SOURCE_SHA256
from ..plan.recipe import StoredType
from ..qtype import Effort
from ..sources.checkpoint import SourceTensor
from ..squares import sum_of_squares, total_of
from .bias_correction import mean_error
from .layer_encoder import LayerEncoder

_log = PrintableLog(__name__)

_UNSUSPICIOUS = torch.finfo(torch.float16).max ** 2
"""A squared error that a slice within the range of every type may have; types have factors in float16."""


class Slice(NamedTuple):
    """Consecutive rows of a tensor."""

    tensor: SourceTensor
    weight: Tensor
    """(rows, in_features), float32 on the device of the conversion; while it is read, as stored and in main memory."""
    packed: Tensor | None
    """uint8: the bytes that `weight` was dequantized from; None if the source does not store a ggml type."""
    is_last: bool
    tried: Tensor | None = None
    """float32, (rows, in_features): rows of the whole tensor to try its encoder on; only in the first slice."""


@dataclass
class OpenFile:
    """A file that is being written, and the errors of its current tensor; a context manager."""

    writer: TensorWriter[Any]
    errors: list[float] = field(init=False)
    noise: float = 0.0
    mean_errors: list[Tensor] = field(default_factory=list)
    """float32 (rows,) each: by how much the outputs of the last weight are off on average."""
    result: Path | QuantError = field(init=False)
    """The path of the finished file, or why it was given up."""
    is_given_up: bool = False
    _is_open: bool = False
    _kept: frozenset[str] = frozenset()
    _pending: Future[None] | None = None

    def __post_init__(self) -> None:
        self.types: dict[str, StoredType] = {spec.name: spec.qtype for spec in self.writer.tensors}

    def __enter__(self) -> OpenFile:
        self.writer.__enter__()
        self._is_open = True
        self.errors = list(self.writer.recorded)
        self._kept = frozenset(spec.name for spec in self.writer.tensors[: len(self.errors)])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_open:
            self._is_open = False
            if isinstance(error, QuantError) or not self.errors:  # It would fail again, or there is nothing to keep.
                self.writer.discard()
            self.writer.__exit__(kind, error, traceback)
            if error is not None and self.writer.keeps:
                _log.warning(
                    "%s: interrupted after %d of %d tensors; the same conversion continues there. To give it up, delete"
                    " %s",
                    *(self.writer.path, len(self.errors), len(self.writer.tensors), temporary_of(self.writer.path)),
                )

    def close(self, sha256: str) -> None:
        """Move the complete file to its path; the source has this SHA-256."""
        errors = np.array(self.errors, np.float32)
        metadata = {RELATIVE_ERROR: errors, SOURCE_SHA256: sha256, DATA_SHA256: self.writer.sha256}
        self.result = self.writer.close(metadata)

    def give_up(self, failure: QuantError) -> None:
        """Remove what was written of the file."""
        with suppress(QuantError):
            self.wait()
        self.__exit__(type(failure), failure, None)
        self.is_given_up, self.result = True, failure

    def holds(self, name: str) -> bool:
        """Return whether an unfinished conversion has already written this tensor."""
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
class OpenFiles:
    """The files of a pass."""

    files: list[OpenFile]
    apart: bool = False
    """Whether a file that fails is given up, and the others go on; otherwise its error ends the pass."""

    @property
    def are_given_up(self) -> bool:
        return all(file.is_given_up for file in self.files)

    def each(self, action: Callable[[OpenFile], object]) -> None:
        """Do something with every file that is not given up."""
        for file in self.files:
            if file.is_given_up:
                continue
            try:
                action(file)
            except QuantError as error:
                if not self.apart:
                    raise
                file.give_up(error)
