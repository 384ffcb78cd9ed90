"""Conversion of a checkpoint to GGUF files: what is to be made, whether it is there already, and the report."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..device import usable_device
from ..files.disk_space import leftovers
from ..inspection.report import FileReport, inspect
from ..plan.recipe import Fallback
from ..progress import Progress
from ..qtype import Effort
from ..sources.checkpoint import Checkpoint, open_checkpoint
from ..statistics.importance import check_importance
from ..units import GIB
from .output import Output
from .planning import plan_outputs
from .resources import check_resources
from .settings import Settings, Target
from .stream import Stream

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
        modules: files of add-ons (VACE and the like) that become part of the model.
        five_d: store the patch embedding in its 5 dimensions, for loaders that do not read it flattened.
        allow_non_finite: write 0 for NaN and infinity, and report the tensors, instead of refusing these.

    Raises:
        QuantError: an unusable source, destination, recipe, size or device, the importance of another model, or less
            disk or main memory than it takes.
    """
    settings = Settings(effort, importance, device, overwrite, five_d, allow_non_finite, modules)
    (report,) = convert_all(source, [Target(Path(destination), recipe, target_size)], settings, progress=progress)
    return report


def convert_all(
    source: str | Path | Checkpoint,
    targets: Sequence[Target],
    settings: Settings,
    *,
    progress: Progress | None = None,
) -> list[ConversionReport]:
    """Make several files in one pass over the source, as `convert` makes one.

    Raises:
        QuantError: as `convert`.
    """
    started = time.monotonic()
    device = usable_device(settings.device)
    with source if isinstance(source, Checkpoint) else open_checkpoint(source, settings.add_ons) as checkpoint:
        checkpoint = checkpoint.allowing_non_finite() if settings.allow_non_finite else checkpoint
        doubts = check_importance(settings.importance, checkpoint.tensors)
        outputs = [Output.of(target, checkpoint, settings) for target in targets]
        warnings = (*leftovers([target.destination for target in targets]), *_lossy(checkpoint), *doubts)
        for warning in warnings:
            _log.warning(warning)
        stream = Stream(checkpoint, settings, device, progress)
        with checkpoint.files.without_hashing():
            plans = plan_outputs(stream, outputs)
        planned = zip(outputs, plans, strict=True)
        writers = [output.writer(plan, checkpoint, settings) for output, plan in planned if not output.reused]
        check_resources(checkpoint, writers)
        written = iter(stream.write(writers) if writers else ())
    seconds = time.monotonic() - started
    return [
        ConversionReport(
            **vars(inspect(output.target.destination if output.reused else next(written))),
            source=checkpoint.path,
            source_bytes=checkpoint.identity.size,
            fallbacks=plan.fallbacks,
            warnings=(*warnings, *_zeroed(checkpoint)),
            seconds=seconds,
            reused=output.reused,
        )
        for output, plan in zip(outputs, plans, strict=True)
    ]


def _lossy(checkpoint: Checkpoint) -> list[str]:
    stored = ", ".join(checkpoint.quantized_formats)
    return [f"{checkpoint.name} is quantized already ({stored}): the errors of both add up"] if stored else []


def _zeroed(checkpoint: Checkpoint) -> list[str]:
    names = sorted(checkpoint.zeroed or ())
    return [f"NaN or infinity became 0 in {len(names)} tensors, the first is {names[0]}"] if names else []
