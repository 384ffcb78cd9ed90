"""The walk through a model that quantizes it block by block into a GGUF.

Only one block is in memory at a time. The states between blocks are on the disk, and so is every finished block. A walk
that was stopped in any way continues at the first block that is missing.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..conversion.convert import ConversionReport
from ..conversion.layer_encoder import LayerEncoder
from ..conversion.output import Output
from ..conversion.planning import plan_outputs
from ..conversion.resources import check_resources
from ..conversion.settings import Settings, Target
from ..conversion.stream import Stream
from ..device import usable_device
from ..errors import PrintableLog, QuantError
from ..files.disk_space import check_space, temporary_of
from ..gguf.layout import TensorSpec
from ..gguf.provenance import DATA_SHA256, RELATIVE_ERROR, SOURCE_SHA256
from ..gguf.writer import GGUFWriter
from ..inspection.report import inspect
from ..plan.recipe import GGUF_RECIPES
from ..progress import Progress
from ..qtype import Effort, QuantType
from ..sources.checkpoint import Checkpoint
from ..squares import sum_of_squares
from ..units import counted
from .block import BlockModule, BlockTuning, TunedBlock
from .capture import CapturedCalls
from .states import StateFolder

_log = PrintableLog(__name__)

_BLOCK = re.compile(r"blocks\.(\d{1,4})\.")
_EXACT = "F32"
_UNITS = 1000
"""The units of progress in a block."""
_MINUTE = 90
"""The seconds from which a time is given in minutes."""


@dataclass(frozen=True)
class TuneSettings:
    """The settings of a tuning.

    Args:
        effort: of the rounding.
        device: that runs the blocks and quantizes them.
        overwrite: replace a destination that is another file.
        progress: is called with the passes done, the passes in total, and the block and the time left. It may raise any
            exception to stop; the same tuning then continues at the block that was not finished.
    """

    effort: Effort = "best"
    device: str | torch.device = "cpu"
    overwrite: bool = False
    progress: Progress | None = None


def tune(
    checkpoint: Checkpoint,
    destination: Path,
    recipe: str,
    calls: CapturedCalls,
    block: BlockModule,
    settings: TuneSettings,
) -> ConversionReport:
    """Quantize a checkpoint to the types and the size that `convert` gives it, each block for its own outputs.

    Args:
        checkpoint: an unquantized Wan transformer, which is closed at the end.
        destination: path of the .gguf file. Its folder must exist.
        recipe: as for `convert`.
        calls: of the first block of this model.
        block: the code of its blocks.

    Returns:
        The report of the file.

    Raises:
        QuantError: a source that is quantized already or not a Wan transformer, an unusable destination or recipe, too
            little disk space or main memory.
    """
    started = time.monotonic()
    device = usable_device(settings.device)
    made_with = Settings(settings.effort, None, device, settings.overwrite, tuned=calls.sha256)
    with checkpoint:
        _check_source(checkpoint, calls)
        target = Target(destination, recipe)
        if target.is_native:
            raise QuantError(f"recipe {recipe}: cannot be tuned, expected one of {', '.join(GGUF_RECIPES)}; choose one")
        output = Output.of(target, checkpoint, made_with)
        for note in output.notes:
            _log.warning(note)
        (plan,) = plan_outputs(Stream(checkpoint, made_with, device, None), [output])
        path = destination
        if not output.reused:
            metadata = {**output.metadata, SOURCE_SHA256: checkpoint.files.sha256()}
            types = {name: qtype for name, qtype in plan.types.items() if isinstance(qtype, QuantType)}
            specs = [TensorSpec(name, qtype, checkpoint.tensors[name].shape) for name, qtype in types.items()]
            walk = _Walk(checkpoint, specs, metadata, destination, calls, block, settings)
            path = walk.run()
    return ConversionReport(
        **vars(inspect(path)),
        source=checkpoint.path,
        source_bytes=checkpoint.identity.size,
        fallbacks=plan.fallbacks,
        warnings=output.notes,
        notes=(),
        seconds=time.monotonic() - started,
        reused=output.reused,
    )


def _check_source(checkpoint: Checkpoint, calls: CapturedCalls) -> None:
    checkpoint.check_complete()
    if checkpoint.quantized_formats:
        formats = ", ".join(checkpoint.quantized_formats)
        raise QuantError(
            f"{checkpoint.name}: is quantized already ({formats}), expected the full-precision model; load that one"
        )
    blocks = {match[1] for name in checkpoint.tensors if (match := _BLOCK.match(name))}
    if len(blocks) != len(calls.signature):
        raise QuantError(
            f"{calls.path}: was captured from a model of {counted(len(calls.signature), 'block')}, expected the"
            f" {len(blocks)} of {checkpoint.name}; connect the model that was captured"
        )


class _Walk:
    """One walk: what is in the file already, and the states where it continues."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        specs: Sequence[TensorSpec],
        metadata: Mapping[str, object],
        path: Path,
        calls: CapturedCalls,
        block: BlockModule,
        settings: TuneSettings,
    ) -> None:
        self._checkpoint, self._specs, self._metadata, self._path = checkpoint, specs, metadata, path
        self._calls, self._block, self._settings = calls, block, settings
        self._groups = [(number, list(group)) for number, group in groupby(specs, _block_number)]
        self._device = usable_device(settings.device)
        recipe = metadata["wanquant.recipe"]
        fingerprint = f"{metadata[SOURCE_SHA256]} {calls.sha256} {recipe} {settings.effort}"
        self._states = StateFolder(path, fingerprint, calls)
        self._pace = _Pace(settings.progress, len(calls.signature))
        self._errors: list[float] = []

    def run(self) -> Path:
        """Write the file, and return its path."""
        overwrite = self._settings.overwrite
        writer = GGUFWriter(self._path, self._metadata, self._specs, overwrite=overwrite, resume=True, keep=True)
        check_resources(self._checkpoint, [writer])
        check_space({self._path: writer.nbytes, self._states.folder: self._states.missing_bytes})
        try:
            with writer:
                path = self._write_all(writer)
        except BaseException:
            self._states.close()
            _log.warning(
                "%s: the tuning stopped; the same inputs continue it. To give it up, delete %s and %s",
                self._path,
                temporary_of(self._path),
                self._states.folder,
            )
            raise
        self._states.delete()
        return path

    def _write_all(self, writer: GGUFWriter) -> Path:
        self._errors = list(writer.recorded)
        kept = {spec.name for spec in self._specs[: len(self._errors)]}
        for number, specs in self._groups:
            missing = [spec for spec in specs if spec.name not in kept]
            if number is None:
                self._write(writer, missing, {})
            elif missing:
                self._tune(writer, number, specs, missing)
        self._checkpoint.identity.check_unchanged()
        return writer.close({RELATIVE_ERROR: np.array(self._errors, np.float32), DATA_SHA256: writer.sha256})

    def _tune(self, writer: GGUFWriter, number: int, specs: Sequence[TensorSpec], missing: list[TensorSpec]) -> None:
        """Tune a block, write the states after it, and then the tensors of it that are not in the file yet."""
        if not self._states.has(number):
            raise QuantError(
                f"{self._states.folder}: lacks the states before block {number}, where the unfinished file of"
                f" {self._path} ends; delete {temporary_of(self._path)} to begin anew"
            )
        self._pace.begin_block(number)
        local = {spec.name: spec.name.partition(f"blocks.{number}.")[2] for spec in specs}
        source = {local[spec.name]: self._read(spec) for spec in specs}
        types = {local[spec.name]: spec.qtype for spec in specs if spec.qtype.name != _EXACT}
        chains = self._states.before(number)
        tuning = BlockTuning(self._block, source, types, self._calls, chains, self._device, self._pace.step)
        tuned = tuning.run(self._settings.effort)
        if number + 1 < len(self._calls.signature):
            after = tuning.output(source, chains.exact), tuning.output(tuned.weights, chains.quantized)
            self._states.write(number + 1, *after)
        self._write(writer, missing, {name: (tuned, local[name]) for name in local})
        self._states.keep_only(number + 1)

    def _write(
        self, writer: GGUFWriter, specs: Sequence[TensorSpec], tuned: Mapping[str, tuple[TunedBlock, str]]
    ) -> None:
        """Write tensors, those of no block as a conversion without statistics does."""
        for spec in specs:
            source = self._read(spec)
            block, local = tuned.get(spec.name, (TunedBlock({}, {}), ""))
            packed = block.packed.get(local)
            if packed is None:
                weight = block.weights.get(local, source)
                packed = LayerEncoder().quantize(spec.qtype, weight.reshape(-1, spec.shape[-1]), self._settings.effort)
            stored = spec.qtype.dequantize(packed).view(source.shape)
            signal = sum_of_squares(source)
            self._errors.append(math.sqrt(sum_of_squares(stored.sub_(source)) / signal) if signal else 0.0)
            writer.write(spec.name, packed)
            writer.record(self._errors[-1])

    def _read(self, spec: TensorSpec) -> Tensor:
        """Return an unquantized tensor: float32, in its shape, on the device."""
        values = self._checkpoint.tensors[spec.name].read().to(self._device, torch.float32).view(spec.shape)
        if not bool(values.isfinite().all()):
            raise QuantError(
                f"{self._checkpoint.path}: tensor {spec.name}: holds NaN or infinity, expected finite numbers; get the"
                " model again"
            )
        return values


class _Pace:
    """The progress of a walk in blocks, with the time that is left."""

    def __init__(self, progress: Progress | None, blocks: int) -> None:
        self._progress, self._blocks = progress, blocks
        self._block = self._steps = self._steps_of_block = 0
        self._started: tuple[float, int] | None = None
        """The time and the block at which this walk began."""

    def begin_block(self, block: int) -> None:
        """Begin a block; those before are finished, now or by an earlier walk."""
        self._started = self._started or (time.monotonic(), block)
        self._block, self._steps_of_block, self._steps = block, self._steps, 0

    def step(self, where: str) -> None:
        """Report what runs next in the block."""
        share = min(self._steps / self._steps_of_block, 1.0) if self._steps_of_block else 0.0
        self._steps += 1
        if self._progress is not None:
            done, number = self._block + share, f"block {self._block + 1} of {self._blocks}"
            self._progress(int(done * _UNITS), self._blocks * _UNITS, f"{number}{where}{self._left(done)}")

    def _left(self, done: float) -> str:
        time_of_start, first = self._started or (0.0, 0)
        if self._block == first:  # the first block has no other to compare with
            return ""
        seconds = (time.monotonic() - time_of_start) / (done - first) * (self._blocks - done)
        return f", {seconds / 60:.0f} min left" if seconds > _MINUTE else f", {seconds:.0f} s left"


def _block_number(spec: TensorSpec) -> int | None:
    match = _BLOCK.match(spec.name)
    return int(match[1]) if match else None
