"""Conversion of a checkpoint to GGUF files.

`convert` makes one file and `convert_all` several in one pass over the source. A file that exists already as the result
of the same conversion is reused.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..device import has_float8, has_float64, usable_device
from ..errors import PrintableLog, QuantError, printable_lines
from ..files.disk_space import leftovers
from ..inspection.report import FileReport, inspect
from ..plan.recipe import Fallback
from ..progress import Progress
from ..qtype import Effort
from ..sources.baked_lora import LoRA, LoRALike
from ..sources.checkpoint import Checkpoint, open_checkpoint
from ..statistics.calibration import Calibration
from ..statistics.importance import check_importance
from ..units import GIB
from .bias_correction import corrected_biases, with_biases_last
from .notes import non_finite_warning, notes_on, requantization_warning
from .output import Output
from .planning import check_output, plan_outputs
from .resources import check_resources
from .settings import Settings, Target
from .stream import Stream

_log = PrintableLog(__name__)


@dataclass(frozen=True)
class ConversionReport(FileReport):
    """A report of a converted file and of the conversion that made it."""

    source: Path
    source_bytes: int
    fallbacks: tuple[Fallback, ...]
    """The tensors that got another type than the recipe's."""
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    """Sentences on what the statistics of the inputs were used for."""
    seconds: float
    reused: bool
    """True if the destination already held the result of this conversion, so that nothing was written."""

    @property
    def destination(self) -> Path:
        """The path of the file; on Windows, it differs from the requested one if that was in use."""
        return self.path

    def text(self) -> str:
        done = "is up to date already" if self.reused else f"written in {self.seconds:.1f} s"
        return printable_lines(
            (
                f"{self.source.name} ({self.source_bytes / GIB:.3f} GiB) -> {self.path.name}"
                f" ({self.nbytes / GIB:.3f} GiB), {done}",
                *self.warnings,
                *self.notes,
                *(f"{f.name}: {f.got} instead of {f.wanted}: {f.reason}" for f in self.fallbacks),
                *super().text().splitlines(),
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
            "notes": list(self.notes),
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
    loras: Sequence[LoRALike] = (),
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert a Wan transformer, an add-on for one, or Wan's T5 text encoder to a GGUF file.

    The destination appears complete or not at all. A refusal leaves nothing behind. If the process is killed, or a
    conversion with a calibration is interrupted, the finished tensors stay in a temporary file in the same folder. The
    same conversion then continues from there and writes the same bytes. A destination that is already the result of the
    same conversion is left as it is.

    Example:
        report = convert("wan2.1_t2v_14B_bf16.safetensors", "wan2.1_t2v_14B-Q4_K_M.gguf", "Q4_K_M")
        print(report.text())

    Args:
        source: path of a .safetensors or GGUF file, of a folder of shards, or of a shard or their index; or an open
            `Checkpoint`, which is closed at the end. A source that is quantized already adds its own error, which is
            logged as a warning.
        destination: path of the .gguf file. Its folder must exist.
        recipe: a mix of types such as "Q8_0", "Q4_K_M" or "INT8", a key of `quant.plan.recipe.RECIPES`. It decides
            whether the file is a GGUF or a safetensors.
        target_size: the largest size of the file in GiB. The types are then chosen for the least error at that size. A
            recipe of ComfyUI's own formats mixes those that load wherever it does. Any other is ignored.
        effort: "best" searches for the scales and codes of least squared error, in which large weights count more, and
            then restores the gain of every row. "fast" writes the same bytes as ggml. With `importance`, both search.
            "thorough" takes longer than "best" for less error with a calibration, and is the same without one.
        importance: the statistics of the layers' inputs, from `read_importance` or `read_calibration`. By tensor name,
            a floating point tensor of shape (in_features,) with the mean square of each input channel, by which the
            squared error of a weight counts. With a calibration, weights are also rounded as in GPTQ for the least
            error of the layer's outputs. So are those of ComfyUI's formats that rotate their inputs, with either.
        device: the device that quantizes, such as "cpu" or "cuda".
        overwrite: replace a destination that is another file or the result of another conversion.
        five_d: store the patch embedding with its 5 dimensions, for loaders that cannot read it flattened to 4.
        allow_non_finite: write 0 for NaN and infinity and report their tensors, instead of refusing the source.
        modules: paths of add-on files (VACE and the like) that are merged onto the source.
        loras: LoRAs that are added to the weights before these are quantized: paths, texts as FILE:STRENGTH, or pairs
            of path and strength. They are plain ones (up, down, alpha) or differences. ComfyUI would round a quantized
            layer again to add a LoRA to it.
        progress: is called with the source bytes done, the source bytes in total and the name of the tensor. It may
            raise any exception to stop the conversion.

    Returns:
        The report of the file: its path, size, tensors and their relative errors, warnings, and more.

    Raises:
        QuantError: an unusable or incomplete source, an unusable destination, recipe, size or device; statistics of
            another model; NaN or infinity in the source; too little disk space or main memory.
    """
    added = [LoRA.of(lora) for lora in loras]
    settings = Settings(effort, importance, device, overwrite, five_d, allow_non_finite, modules, added)
    (report,) = convert_all(source, [Target(Path(destination), recipe, target_size)], settings, progress=progress)
    return report


def convert_all(
    source: str | Path | Checkpoint,
    targets: Sequence[Target],
    settings: Settings,
    *,
    progress: Progress | None = None,
) -> list[ConversionReport]:
    """Make several files as `convert` makes one, in one pass over the source.

    Args:
        source: as for `convert`.
        targets: the files to make.
        settings: the settings of all files.
        progress: as for `convert`; every source byte counts once.

    Returns:
        One report per target, in the same order.

    Raises:
        QuantError: as for `convert`.
    """
    reports = _convert(source, targets, settings, progress, apart=False)
    return [report for report in reports if isinstance(report, ConversionReport)]


def convert_each(
    source: str | Path | Checkpoint,
    targets: Sequence[Target],
    settings: Settings,
    *,
    progress: Progress | None = None,
) -> list[ConversionReport | QuantError]:
    """Make files as `convert_all` does, but where one of them fails, go on with the others.

    Returns:
        One report per target, in the same order, or why the file is missing.
    """
    try:
        return _convert(source, targets, settings, progress, apart=True)
    except QuantError as error:
        return [error] * len(targets)


def _convert(
    source: str | Path | Checkpoint,
    targets: Sequence[Target],
    settings: Settings,
    progress: Progress | None,
    *,
    apart: bool,
) -> list[ConversionReport | QuantError]:
    started = time.monotonic()
    device = _device(settings, targets)
    with _opened(source, settings) as checkpoint:
        checkpoint.check_complete()
        checkpoint = checkpoint.allowing_non_finite() if settings.allow_non_finite else checkpoint
        missing_importance = check_importance(settings.importance, checkpoint.tensors)
        biases = corrected_biases(settings, checkpoint.tensors)
        checkpoint = with_biases_last(checkpoint, biases)
        stream = Stream(checkpoint, settings, device, progress, biases)
        refused: dict[Target, QuantError] = {}
        outputs = []
        for target in targets:
            try:
                outputs.append(output := Output.of(target, checkpoint, settings))
                check_output(stream, output)
            except QuantError as error:
                if not apart:
                    raise
                refused[target] = error
        outputs = [output for output in outputs if output.target not in refused]
        unfinished = leftovers([target.destination for target in targets])
        doubts = (*checkpoint.warnings, *requantization_warning(checkpoint))
        warnings = (*unfinished, *doubts, *missing_importance)
        for warning in (*warnings, *(note for output in outputs for note in output.notes)):
            _log.warning(warning)
        with checkpoint.files.without_hashing():
            plans = plan_outputs(stream, outputs)
        pairs = list(zip(outputs, plans, strict=True))
        missing = [(output, plan) for output, plan in pairs if not output.reused]
        writers = [output.writer(plan, checkpoint, settings) for output, plan in missing]
        written: Iterable[Path | QuantError]
        try:
            check_resources(checkpoint, writers, settings.importance)
            written = stream.write(writers, apart=apart) if writers else ()
        except QuantError as error:
            if not apart:
                raise
            written = [error] * len(writers)
    seconds = time.monotonic() - started
    kept = {output.target: len(writer.recorded) for (output, _), writer in zip(missing, writers, strict=True)}
    made, next_one = dict[Target, ConversionReport | QuantError](refused), iter(written)
    for output, plan in pairs:
        path = output.target.destination if output.reused else next(next_one)
        made[output.target] = (
            path
            if isinstance(path, QuantError)
            else ConversionReport(
                **vars(inspect(path)),
                source=checkpoint.path,
                source_bytes=checkpoint.identity.size,
                fallbacks=plan.fallbacks,
                warnings=(*warnings, *output.notes, *non_finite_warning(checkpoint)),
                notes=(*checkpoint.notes, *(() if output.reused else notes_on(stream, plan, kept[output.target]))),
                seconds=seconds,
                reused=output.reused,
            )
        )
    return [made[target] for target in targets]


def _opened(source: str | Path | Checkpoint, settings: Settings) -> Checkpoint:
    """Return the source with the add-ons and LoRAs of the settings; an open one must have them already."""
    if not isinstance(source, Checkpoint):
        return open_checkpoint(source, settings.add_ons, settings.loras)
    if settings.loras and source.loras != tuple(settings.loras):
        raise QuantError(f"{source.path}: is open without LoRA {settings.loras[0]}, expected with it; convert by path")
    return source


def _device(settings: Settings, targets: Sequence[Target]) -> torch.device:
    """Return the device of a conversion: the CPU where the given one lacks a dtype that is needed."""
    device = usable_device(settings.device)
    if isinstance(settings.importance, Calibration) and not has_float64(device):
        _log.warning("Calibrated rounding needs float64, which %s lacks; the CPU converts", device)
        return torch.device("cpu")
    if any(target.is_native for target in targets) and not has_float8(device):
        _log.warning("ComfyUI's own formats need FP8, which %s lacks; the CPU converts", device)
        return torch.device("cpu")
    return device
