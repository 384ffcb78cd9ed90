"""Streaming conversion of a checkpoint to GGUF: one slice of a tensor in memory at a time."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import budget
from .checkpoint import Checkpoint, SourceTensor, open_checkpoint
from .errors import QuantError
from .gguf_header import read_header
from .gguf_writer import GGUFWriter, TensorSpec
from .provenance import (
    FIVE_D,
    RELATIVE_ERROR,
    SOURCE_MTIME,
    SOURCE_SHA256,
    TARGET_SIZE,
    VERSION,
    carried_metadata,
    fingerprint,
    is_same_job,
)
from .qtype import QTYPES, Effort, QuantType
from .recipe import Fallback, Plan, Recipe, find_recipe, plan
from .report import GIB, FileReport, inspect

Progress = Callable[[int, int, str], None]
"""Called with source bytes done, source bytes in all and the tensor's name; may raise anything to stop."""

_log = logging.getLogger(__name__)

# Bounds the float32 temporaries of a slice and the time between two reports; accelerators prefer few launches.
_SLICE_WEIGHTS = {"cpu": 1 << 20}
_SLICE_WEIGHTS_DEFAULT = 1 << 23

# LLAMA_FTYPE_GUESSED of llama.cpp's include/llama.h: the tensors tell.
_MIXED = 1024


@dataclass(frozen=True)
class ConversionReport(FileReport):
    """The written file, and how it came about."""

    source: Path
    source_bytes: int
    fallbacks: tuple[Fallback, ...]
    warnings: tuple[str, ...]
    seconds: float
    reused: bool
    """The destination held this very result already, and nothing was written."""

    @property
    def destination(self) -> Path:
        """The file, which has a free name beside the wanted one where that was in use (Windows)."""
        return self.path

    def text(self) -> str:
        done = "is up to date already" if self.reused else f"written in {self.seconds:.1f} s"
        return "\n".join(
            (
                f"{self.source.name} ({self.source_bytes / GIB:.3f} GiB) -> {self.path.name}"
                f" ({self.nbytes / GIB:.3f} GiB), {done}",
                *self.warnings,
                *(f"{f.name}: {f.got} instead of {f.wanted}: {f.reason}" for f in self.fallbacks),
                super().text(),
            )
        )

    def json(self) -> dict[str, Any]:
        return {
            **super().json(),
            "source": str(self.source),
            "source_bytes": self.source_bytes,
            "seconds": self.seconds,
            "reused": self.reused,
            "fallbacks": [fallback._asdict() for fallback in self.fallbacks],
            "warnings": list(self.warnings),
        }


def convert(
    source: str | Path,
    destination: str | Path,
    recipe: str = "Q4_K_M",
    *,
    target_size: float | None = None,
    effort: Effort = "best",
    importance: Mapping[str, Tensor] | None = None,
    device: str | torch.device = "cpu",
    overwrite: bool = False,
    five_d: bool = False,
    modules: Sequence[str | Path] = (),
    progress: Progress | None = None,
) -> ConversionReport:
    """Converts a Wan checkpoint to GGUF; the destination appears complete or not at all.

    Args:
        source: what `open_checkpoint` takes; one that is quantized already makes a second error, which is logged.
        destination: path of a .gguf file. One that holds the result of the same job already is left as it is.
        recipe: a key of `RECIPES`.
        target_size: GiB that the file takes at most; the types are then chosen for the least error, by no recipe.
        effort: "best" searches for the smallest squared error, "fast" rounds.
        importance: (n,) weight of each input column in the squared error, by tensor name.
        device: where encoding runs.
        overwrite: replace a destination that holds anything else.
        modules: files of add-on modules (VACE and the like) that become part of the model.
        five_d: store the patch embedding in its 5 dimensions, for loaders that do not read it flattened.

    Raises:
        QuantError: an unusable source, destination, recipe, size or device.
    """
    started = time.monotonic()
    source, destination, device = Path(source), Path(destination), _usable_device(device)
    _check_paths(source, destination)
    chosen, target_bytes = find_recipe(recipe), _target_bytes(target_size)
    with open_checkpoint(source, modules) as checkpoint:
        warnings = _warnings(checkpoint)
        job = _job_metadata(checkpoint, chosen, target_bytes, effort, importance, five_d)
        reused = destination.exists() and _is_up_to_date(destination, checkpoint, job)
        if destination.exists() and not reused and not overwrite:
            raise QuantError(f"{destination}: exists, made in another way; choose another name or allow overwriting")
        planned = Plan({}, ()) if target_bytes else plan(chosen, checkpoint.tensors)
        if not reused:
            conversion = _Conversion(checkpoint, effort, importance or {}, device, progress)
            planned = conversion.within_range(conversion.plan_for_size(job) if target_bytes else planned)
            destination = conversion.write(destination, job, planned, overwrite)
    return ConversionReport(
        **vars(inspect(destination)),
        source=source,
        source_bytes=checkpoint.identity.size,
        fallbacks=planned.fallbacks,
        warnings=warnings,
        seconds=time.monotonic() - started,
        reused=reused,
    )


@dataclass
class _Conversion:
    checkpoint: Checkpoint
    effort: Effort
    importance: Mapping[str, Tensor]
    device: torch.device
    progress: Progress | None
    done_bytes: int = 0

    def plan_for_size(self, job: Mapping[str, Any]) -> Plan:
        """The types of the least error in the size that the job names."""
        tensors = self.checkpoint.tensors
        fronts = budget.measure(
            tensors, self.importance, self.effort, self.device, lambda tensor: self._report(tensor, 0)
        )
        return budget.plan_for_size(int(job[TARGET_SIZE]), tensors, job, fronts, five_d=job[FIVE_D])

    def within_range(self, planned: Plan) -> Plan:
        """Replaces F16 by BF16 for tensors with values that F16 cannot hold."""
        types, fallbacks = dict(planned.types), list(planned.fallbacks)
        for name, tensor in self.checkpoint.tensors.items():
            if types[name].name == "F16" and tensor.dtype != torch.float16 and not self._fits_f16(tensor):
                types[name] = QTYPES["BF16"]
                fallbacks.append(Fallback(name, "F16", "BF16", "values beyond the range of F16"))
        return Plan(types, tuple(fallbacks))

    def write(self, destination: Path, job: Mapping[str, Any], planned: Plan, overwrite: bool) -> Path:
        """Returns the path that the file got."""
        tensors = self.checkpoint.tensors
        specs = [TensorSpec(name, qtype, tensors[name].shape) for name, qtype in planned.types.items()]
        if destination.exists() and not _is_replaceable(destination):
            _log.warning("%s is in use by a program: the new file gets a name beside it", destination)
        with GGUFWriter(destination, job, specs, overwrite=overwrite, five_d=job[FIVE_D]) as writer:
            errors = np.zeros(len(specs), np.float32)
            for index, spec in enumerate(specs):
                packed, errors[index] = self._encode(tensors[spec.name], spec.qtype)
                writer.write(spec.name, packed)
            self.checkpoint.identity.check_unchanged()
            return writer.close({RELATIVE_ERROR: errors, SOURCE_SHA256: self.checkpoint.file.sha256()})

    def _encode(self, tensor: SourceTensor, qtype: QuantType) -> tuple[Tensor, float]:
        """Returns uint8 (rows, row_bytes) and the relative error."""
        columns = tensor.shape[-1]
        importance = self.importance.get(tensor.name)
        importance = None if importance is None else importance.to(self.device)
        packed = torch.empty(qtype.packed_shape((math.prod(tensor.shape) // columns, columns)), dtype=torch.uint8)
        signal = noise = 0.0
        for start, stop, weight in self._slices(tensor):
            energy = weight.square().sum().item()
            if not math.isfinite(energy):
                raise QuantError(
                    f"{self.checkpoint.path}: tensor {tensor.name}: holds NaN or infinity; the file is damaged"
                )
            encoded = qtype.quantize(weight, importance, self.effort)
            packed[start:stop] = encoded.cpu()
            signal += energy
            noise += qtype.dequantize(encoded).sub_(weight).square_().sum().item()
            self._report(tensor, weight.numel() * tensor.dtype.itemsize)
        return packed, math.sqrt(noise / signal) if signal else 0.0

    def _slices(self, tensor: SourceTensor) -> Iterator[tuple[int, int, Tensor]]:
        """Yields row numbers and float32 (rows, columns) on the device."""
        columns = tensor.shape[-1]
        rows = math.prod(tensor.shape) // columns
        step = max(1, _SLICE_WEIGHTS.get(self.device.type, _SLICE_WEIGHTS_DEFAULT) // columns)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            values = tensor.read(start * columns, stop * columns)
            yield start, stop, values.to(self.device).float().view(-1, columns)

    def _fits_f16(self, tensor: SourceTensor) -> bool:
        largest = torch.finfo(torch.float16).max
        for _, _, weight in self._slices(tensor):
            self._report(tensor, 0)
            if not weight.abs().amax() <= largest:
                return False
        return True

    def _report(self, tensor: SourceTensor, nbytes: int) -> None:
        self.done_bytes += nbytes
        if self.progress is not None:
            self.progress(self.done_bytes, self.checkpoint.nbytes, tensor.name)


def _job_metadata(
    checkpoint: Checkpoint,
    recipe: Recipe,
    target_bytes: int,
    effort: Effort,
    importance: Mapping[str, Tensor] | None,
    five_d: bool,
) -> dict[str, Any]:
    """All metadata of the file; the last two values are placeholders until every tensor is written."""
    return {
        "general.architecture": checkpoint.architecture,
        "general.quantization_version": 2,
        "general.file_type": _MIXED if target_bytes else recipe.file_type,
        "general.name": checkpoint.path.stem,
        "wanquant.version": VERSION,
        "wanquant.recipe": "" if target_bytes else recipe.name,
        TARGET_SIZE: np.uint64(target_bytes),
        "wanquant.effort": effort,
        "wanquant.importance": fingerprint(importance),
        FIVE_D: five_d,
        "wanquant.source_name": checkpoint.name,
        "wanquant.source_size": np.uint64(checkpoint.identity.size),
        "wanquant.source_dtype": checkpoint.stored,
        **checkpoint.gguf_metadata,
        **carried_metadata(checkpoint.metadata),
        SOURCE_MTIME: np.int64(checkpoint.identity.mtime_ns),
        SOURCE_SHA256: "0" * 64,
        RELATIVE_ERROR: np.zeros(len(checkpoint.tensors), np.float32),
    }


def _warnings(checkpoint: Checkpoint) -> tuple[str, ...]:
    if not checkpoint.lossy:
        return ()
    warning = f"{checkpoint.name} is quantized already ({', '.join(checkpoint.lossy)}): the errors of both add up"
    _log.warning(warning)
    return (warning,)


def _is_up_to_date(destination: Path, checkpoint: Checkpoint, job: Mapping[str, Any]) -> bool:
    try:
        existing = read_header(destination).metadata
    except QuantError:
        return False
    if not is_same_job(existing, job):
        return False
    # A copied or touched source has another time but the same content.
    return (
        existing.get(SOURCE_MTIME) == int(job[SOURCE_MTIME]) or existing.get(SOURCE_SHA256) == checkpoint.file.sha256()
    )


def _check_paths(source: Path, destination: Path) -> None:
    if destination.suffix.lower() != ".gguf":
        raise QuantError(f"{destination}: not a .gguf name; choose a destination that ends in .gguf")
    if source.exists() and destination.exists() and source.samefile(destination):
        raise QuantError(f"{destination}: is the source itself; choose another destination")


def _target_bytes(target_size: float | None) -> int:
    """0 without a target."""
    if target_size is None:
        return 0
    if not 0 < target_size < math.inf:
        raise QuantError(f"target size {target_size} GiB: not a size; choose one above 0")
    return int(target_size * GIB)


def _usable_device(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch raises AssertionError where it was built without CUDA
        raise QuantError(f"device {device}: not usable here ({str(error).splitlines()[0]}); use cpu") from error


def _is_replaceable(path: Path) -> bool:
    """Whether Windows would let the file be replaced: not while a program has it mapped."""
    try:
        os.replace(path, path)
    except PermissionError:
        return False
    return True
