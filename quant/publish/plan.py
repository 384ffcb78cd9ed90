"""The plan of a publication: every file with its size and state, and the jobs that make the missing ones."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..conversion.batch import stem_of
from ..conversion.output import Output
from ..conversion.planning import check_output
from ..conversion.resources import memory_needed
from ..conversion.settings import Settings, Target
from ..conversion.stream import Stream
from ..device import usable_device
from ..errors import QuantError, printable_lines
from ..plan.recipe import find_recipe, plan_types
from ..sources.checkpoint import Checkpoint, open_checkpoint
from ..sources.opening import shard_of
from ..statistics.importance import check_importance
from ..units import GIB, counted
from .cost import Rates
from .job import Job, Options
from .request import Request

# What a process has before it encodes anything: Python and PyTorch.
_PROCESS_BYTES = 1 << 29


@dataclass(frozen=True)
class PlannedFile:
    """A file of the plan."""

    target: Target
    nbytes: int = 0
    """The bytes that it will have; for a target size, at most."""
    exists: bool = False
    """Whether the result of the same conversion is there already."""
    why: str = ""
    """Why it cannot be made; empty if it can."""
    memory: int = 0
    """The most main memory in bytes that making it needs."""
    seconds: float = 0.0
    """The predicted time of one core."""
    notes: tuple[str, ...] = ()
    """Sentences on a file that exists."""


@dataclass(frozen=True)
class PlannedModel:
    """A source and its files."""

    source: Path
    stem: str
    files: Sequence[PlannedFile]
    options: Options
    calibration: Path | None = None
    warnings: Sequence[str] = ()


def job_of(model: PlannedModel, files: Sequence[PlannedFile]) -> Job:
    """Return the job that makes some files of a model."""
    memory, seconds = max(file.memory for file in files), sum(file.seconds for file in files)
    targets = tuple(file.target for file in files)
    return Job(model.source, targets, model.options, model.calibration, memory, seconds)


@dataclass(frozen=True)
class Plan:
    """The models of a publication."""

    request: Request
    models: Sequence[PlannedModel]

    @property
    def files(self) -> Iterator[PlannedFile]:
        return (file for model in self.models for file in model.files)

    @property
    def ok(self) -> bool:
        return not any(file.why for file in self.files)

    @property
    def needed_bytes(self) -> int:
        """The bytes of all files that are to be made."""
        return sum(file.nbytes for file in self.files if not (file.exists or file.why))

    @property
    def seconds(self) -> float:
        """The time that one core needs."""
        return sum(file.seconds for file in self.files if not (file.exists or file.why))

    @property
    def free_bytes(self) -> int:
        """The free bytes of the disk that has the folder, or will have it."""
        folder = next(path for path in (self.request.out, *self.request.out.absolute().parents) if path.is_dir())
        return shutil.disk_usage(folder).free

    def text(self) -> str:
        lines = []
        for model in self.models:
            lines.append(f"{model.stem}: {counted(len(model.files), 'file')} of {model.source}")
            lines += [f"  {_row(file)}" for file in model.files if not file.why]
            refused = [(file.target.destination, file.why) for file in model.files if file.why]
            lines += [f"  cannot be made: {text}" for text in by_reason(refused)]
            notes = (note for file in model.files for note in file.notes)
            lines += [f"  warning: {text}" for text in (*model.warnings, *notes)]
        free = self.free_bytes
        lines.append(f"disk: {self.needed_bytes / GIB:.3f} GiB needed, {free / GIB:.3f} GiB free")
        if self.needed_bytes > free:
            lines.append("warning: not all files fit; free some space, or choose another folder")
        lines.append(f"time: about {_duration(self.seconds)} of one core, from a sample of the weights")
        return printable_lines(lines)

    def json(self) -> dict[str, Any]:
        return {
            "files": [
                {
                    "path": str(file.target.destination),
                    "source": str(model.source),
                    "bytes": file.nbytes,
                    "exists": file.exists,
                    "why": file.why or None,
                    "seconds": round(file.seconds, 1),
                    "notes": list(file.notes),
                }
                for model in self.models
                for file in model.files
            ],
            "needed_bytes": self.needed_bytes,
            "free_bytes": self.free_bytes,
            "seconds": round(self.seconds, 1),
        }


def _row(file: PlannedFile) -> str:
    state = "exists already" if file.exists else f"about {_duration(file.seconds)}"
    return f"{file.target.destination.name}: {file.nbytes / GIB:.3f} GiB, {state}"


def by_reason(missing: Sequence[tuple[Path, str]]) -> list[str]:
    """Return a text for each reason, with the names of the files that are missing for it."""
    reasons: dict[str, list[str]] = {}
    for path, why in missing:
        reasons.setdefault(why, []).append(path.name)
    return [f"{names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)}: {why}" for why, names in reasons.items()]


def _duration(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def make_plan(request: Request) -> Plan:
    """Return the plan of a request; nothing is written.

    A source, a calibration or a file that cannot be used is in the plan with the reason.

    Raises:
        QuantError: a pattern that no file matches.
    """
    rates, models = Rates(), list[PlannedModel]()
    taken: dict[str, Path] = {}
    for path in request.paths():
        stem = stem_of(path, request.options.add_ons, request.options.loras)
        if why := _fault_of_name(path, stem, taken):
            models.append(_failed(request, path, stem, why, [Target(path)]))
        else:
            taken[stem] = path
            models.append(_plan_model(request, path, stem, rates))
    return Plan(request, models)


def _fault_of_name(path: Path, stem: str, taken: Mapping[str, Path]) -> str:
    """Return why a source can have no folder of its own; empty if it can."""
    if other := taken.get(stem):
        return f"{path}: its files would have the names of those of {other}; publish it into another folder"
    if stem in ("", ".", ".."):
        return f"{path}: its files would be named {stem!r}, expected a name for a folder; give it another name"
    return ""


def _failed(request: Request, path: Path, stem: str, why: str, targets: Sequence[Target]) -> PlannedModel:
    return PlannedModel(path, stem, [PlannedFile(target, why=why) for target in targets], request.options)


def _plan_model(request: Request, path: Path, stem: str, rates: Rates) -> PlannedModel:
    folder = request.calibrations
    calibration = folder / f"{shard_of(path)[0]}.safetensors" if folder else None
    try:
        settings = request.options.settings(calibration)
        with open_checkpoint(path, settings.add_ons, settings.loras) as checkpoint:
            checkpoint.check_complete()
            missing = check_importance(settings.importance, checkpoint.tensors)
            stream = Stream(checkpoint, settings, usable_device(settings.device), None)
            with checkpoint.files.without_hashing():
                files = [_plan_file(target, checkpoint, settings, stream, rates) for target in request.targets(stem)]
            warnings = (*checkpoint.warnings, *missing)
    except (QuantError, OSError) as error:
        return _failed(request, path, stem, str(error), request.targets(stem))
    return PlannedModel(path, stem, files, request.options, calibration, warnings)


def _plan_file(target: Target, checkpoint: Checkpoint, settings: Settings, stream: Stream, rates: Rates) -> PlannedFile:
    try:
        output = Output.of(target, checkpoint, settings)
        if output.reused:
            nbytes = target.destination.stat().st_size
            return PlannedFile(target, nbytes, exists=True, memory=_PROCESS_BYTES, notes=output.notes)
        check_output(stream, output)
        # For a size, the recipe stands for what its file costs to encode.
        types = plan_types(find_recipe(target.recipe), checkpoint.tensors)
        writer = output.writer(types, checkpoint, settings)
        memory = _PROCESS_BYTES + memory_needed(checkpoint, writer.tensors, settings.importance)
        seconds = rates.seconds(stream, types.types)
    except QuantError as error:
        return PlannedFile(target, why=str(error))
    return PlannedFile(target, target.target_bytes or writer.nbytes, memory=memory, seconds=seconds)


def split(models: Sequence[PlannedModel], workers: int) -> list[Job]:
    """Return the jobs of a plan, the longest first: one for each source, or slices of its recipes.

    Each slice reads its source once more. A job is halved only while the workers would end far apart.
    """
    parts = [(model, [file for file in model.files if not file.why]) for model in models]
    parts = [(model, files) for model, files in parts if files]
    while parts:
        parts.sort(key=lambda part: -_cost(part[1]))
        ends = _ends([_cost(files) for _, files in parts], workers)
        model, files = next((part for part in parts if len(part[1]) > 1), parts[0])
        if max(ends) <= 1.1 * sum(ends) / len(ends) or len(files) == 1:
            break
        parts.remove((model, files))
        parts += [(model, half) for half in _halves(files)]
    return [job_of(model, files) for model, files in parts]


def _cost(files: Sequence[PlannedFile]) -> float:
    return sum(0.0 if file.exists else max(file.seconds, 1e-3) for file in files)


def _ends(costs: Sequence[float], workers: int) -> list[float]:
    """Return when each worker ends, if each takes the next job as soon as it is free."""
    ends = [0.0] * workers
    for cost in costs:
        ends[ends.index(min(ends))] += cost
    return ends


def _halves(files: Sequence[PlannedFile]) -> tuple[list[PlannedFile], list[PlannedFile]]:
    """Return two parts of about the same cost, neither of them empty."""
    first, second = list[PlannedFile](), list[PlannedFile]()
    for file in sorted(files, key=lambda file: -_cost([file])):
        (first if _cost(first) <= _cost(second) and not (first and not second) else second).append(file)
    return first, second
