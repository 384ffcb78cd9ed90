"""A job: some files of one source, made in one pass over it by one process, and what came of each."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..conversion.convert import ConversionReport, convert_each
from ..conversion.settings import Settings, Target
from ..errors import FileInUseError, QuantError, printable
from ..files.regular_file import open_regular
from ..progress import Progress
from ..qtype import Effort
from ..sources.baked_lora import LoRA
from ..statistics.calibration_file import read_calibration
from .entry import entry_of

# The processes of a node that died end within this time, and release their files.
_SECONDS_IN_USE = 30
_READ_BYTES = 16 << 20


@dataclass(frozen=True)
class Options:
    """The options that all jobs have in common."""

    effort: Effort = "best"
    device: str = "cpu"
    overwrite: bool = False
    allow_non_finite: bool = False
    add_ons: tuple[Path, ...] = ()
    loras: tuple[LoRA, ...] = ()

    def settings(self, calibration: Path | None) -> Settings:
        """Return the settings of a conversion.

        Raises:
            QuantError: the calibration cannot be read.
        """
        return Settings(
            effort=self.effort,
            importance=read_calibration(calibration) if calibration else None,
            device=self.device,
            overwrite=self.overwrite,
            allow_non_finite=self.allow_non_finite,
            add_ons=self.add_ons,
            loras=self.loras,
        )


@dataclass(frozen=True)
class Job:
    """Files to make of one source."""

    source: Path
    targets: tuple[Target, ...]
    options: Options
    calibration: Path | None = None
    memory: int = 0
    """The most main memory in bytes that it needs."""
    seconds: float = 0.0
    """The predicted time of one core."""

    def json(self) -> dict[str, Any]:
        """Return plain values, for another process."""
        options = asdict(self.options)
        options["add_ons"] = [str(path) for path in self.options.add_ons]
        options["loras"] = [[str(lora.path), lora.strength] for lora in self.options.loras]
        targets = [[str(target.destination), target.recipe, target.target_size] for target in self.targets]
        calibration = str(self.calibration) if self.calibration else None
        return {"source": str(self.source), "targets": targets, "options": options, "calibration": calibration}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Job:
        """Return the job of another process, from the result of its `json`."""
        options = dict(content["options"])
        options["add_ons"] = tuple(map(Path, options["add_ons"]))
        options["loras"] = tuple(LoRA(Path(path), strength) for path, strength in options["loras"])
        targets = tuple(Target(Path(path), recipe, size) for path, recipe, size in content["targets"])
        calibration = Path(content["calibration"]) if content["calibration"] else None
        return cls(Path(content["source"]), targets, Options(**options), calibration)


@dataclass(frozen=True)
class Result:
    """What became of one file."""

    destination: Path
    entry: Mapping[str, Any] | None = None
    """What the manifest says of it; None if it is missing."""
    why: str = ""
    """Why it is missing."""
    reused: bool = False
    warnings: tuple[str, ...] = ()

    def json(self) -> dict[str, Any]:
        """Return plain values, for another process."""
        return {**asdict(self), "destination": str(self.destination)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Result:
        """Return the result of another process, from the result of its `json`."""
        plain = {"destination": Path(content["destination"]), "warnings": tuple(content["warnings"])}
        return cls(**{**content, **plain})


def failed(job: Job, why: str) -> list[Result]:
    """Return the results of a job of which nothing came."""
    return [Result(target.destination, why=printable(why)) for target in job.targets]


def make(job: Job, threads: int, progress: Progress | None = None) -> list[Result]:
    """Make the files of a job on this many threads, and return one result per target, whatever happens."""
    torch.set_num_threads(threads)
    try:
        for folder in {target.destination.parent for target in job.targets}:
            make_folder(folder)
        settings, results = job.options.settings(job.calibration), dict[Path, Result]()
        left, end = job.targets, time.monotonic() + _SECONDS_IN_USE
        while left:
            reports = convert_each(job.source, left, settings, progress=progress)
            pairs = list(zip(left, reports, strict=True))
            results |= {target.destination: _result(target, report) for target, report in pairs}
            left = tuple(target for target, report in pairs if isinstance(report, FileInUseError))
            if time.monotonic() > end:
                break
            time.sleep(1 if left else 0)
        return [results[target.destination] for target in job.targets]
    except (QuantError, OSError) as error:
        return failed(job, str(error))
    # One source must not end the work on the others.
    except Exception as error:  # noqa: BLE001
        return failed(job, f"{job.source}: {type(error).__name__}: {error}; update WanQuant, or report this message")


def _result(target: Target, report: ConversionReport | QuantError) -> Result:
    if isinstance(report, QuantError):
        return Result(target.destination, why=str(report))
    entry = entry_of(report, target, sha256_of(report.path))
    return Result(target.destination, entry, "", report.reused, report.warnings)


def make_folder(path: Path) -> None:
    """Make a folder, if it is not there.

    Raises:
        QuantError: the system refuses it, or there is a file of this name.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise QuantError(f"{path}: cannot be made as a folder ({reason}); choose another one") from None


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal.

    Raises:
        QuantError: the file cannot be opened.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
