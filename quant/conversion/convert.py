"""Conversion of a checkpoint to GGUF files: what is to be made, whether it is there already, and the report."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import QuantError
from ..files.disk_space import leftovers
from ..gguf.provenance import FIVE_D, SOURCE_MTIME
from ..gguf.writer import GGUFWriter, TensorSpec
from ..inspection.report import GIB, FileReport, inspect
from ..plan.recipe import Fallback, Plan
from ..qtype import Effort
from ..sources.checkpoint import Checkpoint, open_checkpoint
from ..statistics.importance import check_importance
from .job import Job, is_up_to_date, job_metadata
from .planning import plan_jobs, plan_of_reused
from .resources import check_resources
from .stream import Progress, Stream

_log = logging.getLogger(__name__)


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
    source: str | Path | Checkpoint,
    destination: str | Path,
    recipe: str = "Q4_K_M",
    *,
    target_size: float | None = None,
    effort: Effort = "best",
    importance: Mapping[str, Tensor] | None = None,
    device: str | torch.device = "cpu",
    overwrite: bool = False,
    five_d: bool = False,
    allow_non_finite: bool = False,
    modules: Sequence[str | Path] = (),
    progress: Progress | None = None,
) -> ConversionReport:
    """Converts a Wan checkpoint to GGUF; the destination appears complete or not at all.

    An exception leaves nothing behind. If the process is killed, the tensors that are finished stay in a temporary file
    beside the destination, and the same job goes on from there, to the same bytes.

    Args:
        source: what `open_checkpoint` takes, or gave and is closed here; one that is quantized already makes a second
            error, which is logged.
        destination: path of a .gguf file. One that holds the result of the same job already is left as it is.
        recipe: a key of `RECIPES`.
        target_size: GiB that the file takes at most; the types are then chosen for the least error, by no recipe.
        effort: "best" searches for the smallest squared error, large weights counting more, and keeps every row as
            strong as it was; "fast" writes ggml's own bytes. With importance both search.
        importance: (n,) weight of each input column in the squared error, by tensor name: see `read_importance`. With
            that of `read_calibration`, codes are also rounded for the least error of the outputs.
        device: where encoding runs.
        overwrite: replace a destination that holds anything else.
        modules: files of add-on modules (VACE and the like) that become part of the model.
        five_d: store the patch embedding in its 5 dimensions, for loaders that do not read it flattened.
        allow_non_finite: write 0 for NaN and infinity, and report the tensors, instead of refusing these.

    Raises:
        QuantError: an unusable source, destination, recipe, size or device, the importance of another model, or less
            disk or main memory than it takes.
    """
    (report,) = convert_all(
        source,
        [Job(Path(destination), recipe, target_size)],
        effort=effort,
        importance=importance,
        device=device,
        overwrite=overwrite,
        five_d=five_d,
        allow_non_finite=allow_non_finite,
        modules=modules,
        progress=progress,
    )
    return report


def convert_all(
    source: str | Path | Checkpoint,
    jobs: Sequence[Job],
    *,
    effort: Effort = "best",
    importance: Mapping[str, Tensor] | None = None,
    device: str | torch.device = "cpu",
    overwrite: bool = False,
    five_d: bool = False,
    allow_non_finite: bool = False,
    modules: Sequence[str | Path] = (),
    progress: Progress | None = None,
) -> list[ConversionReport]:
    """Like `convert`, for several files in one pass over the source."""
    started = time.monotonic()
    device = usable_device(device)
    with source if isinstance(source, Checkpoint) else open_checkpoint(source, modules) as checkpoint:
        checkpoint = checkpoint.allowing_non_finite() if allow_non_finite else checkpoint
        for job in jobs:
            _check_paths(checkpoint.path, job.destination)
        doubts = check_importance(importance, checkpoint.tensors)
        warnings = (*leftovers([job.destination for job in jobs]), *_lossy(checkpoint), *doubts)
        for warning in warnings:
            _log.warning(warning)
        metadata = {job: job_metadata(checkpoint, job, effort, importance, five_d) for job in jobs}
        new = {job: of_file for job, of_file in metadata.items() if not _is_done(checkpoint, job, of_file, overwrite)}
        plans = {job: plan_of_reused(checkpoint, job) for job in jobs if job not in new}
        stream = Stream(checkpoint, effort, importance or {}, device, progress)
        with checkpoint.file.glancing():
            plans |= plan_jobs(stream, new)
        writers = [_writer(checkpoint, job, of_file, plans[job], overwrite) for job, of_file in new.items()]
        check_resources(checkpoint, writers)
        paths = dict(zip(new, stream.write(writers) if new else (), strict=True))
    seconds = time.monotonic() - started
    return [
        ConversionReport(
            **vars(inspect(paths.get(job, job.destination))),
            source=checkpoint.path,
            source_bytes=checkpoint.identity.size,
            fallbacks=plans[job].fallbacks,
            warnings=(*warnings, *_zeroed(checkpoint)),
            seconds=seconds,
            reused=job not in paths,
        )
        for job in jobs
    ]


def _is_done(checkpoint: Checkpoint, job: Job, metadata: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether the file is there already; any other file there is refused."""
    if not job.destination.exists():
        return False
    done = is_up_to_date(job.destination, checkpoint, metadata)
    if not done and not overwrite:
        raise QuantError(f"{job.destination}: exists, made in another way; choose another name or allow overwriting")
    return done


def _writer(
    checkpoint: Checkpoint, job: Job, metadata: Mapping[str, Any], planned: Plan, overwrite: bool
) -> GGUFWriter:
    destination, shapes = job.destination, checkpoint.tensors
    if destination.exists() and not _is_replaceable(destination):
        _log.warning("%s is in use by a program: the new file gets a name beside it", destination)
    specs = [TensorSpec(name, qtype, shapes[name].shape) for name, qtype in planned.types.items()]
    # A source in memory has no time that tells it from another one; what is zeroed is found by reading everything.
    resume = int(metadata[SOURCE_MTIME]) != 0 and checkpoint.zeroed is None
    return GGUFWriter(destination, metadata, specs, overwrite=overwrite, five_d=metadata[FIVE_D], resume=resume)


def _lossy(checkpoint: Checkpoint) -> list[str]:
    stored = ", ".join(checkpoint.lossy)
    return [f"{checkpoint.name} is quantized already ({stored}): the errors of both add up"] if stored else []


def _zeroed(checkpoint: Checkpoint) -> list[str]:
    names = sorted(checkpoint.zeroed or ())
    return [f"NaN or infinity became 0 in {len(names)} tensors, the first is {names[0]}"] if names else []


def _check_paths(source: Path, destination: Path) -> None:
    if destination.suffix.lower() != ".gguf":
        raise QuantError(f"{destination}: not a .gguf name; choose a destination that ends in .gguf")
    if source.exists() and destination.exists() and source.samefile(destination):
        raise QuantError(f"{destination}: is the source itself; choose another destination")


def usable_device(device: str | torch.device) -> torch.device:
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
