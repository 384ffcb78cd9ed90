"""The command line: `python -m quant convert | publish | inspect | restore | recover | verify | check | advise`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO, TypeAlias

from tqdm import tqdm  # type: ignore[import-untyped]

from .arguments import add_convert_options, add_options_of_source, add_publish_options, add_statistics_options
from .check.run import check_installation
from .conversion.batch import list_targets
from .conversion.convert import ConversionReport, convert_all
from .conversion.restore import DTYPES, restore
from .conversion.settings import Settings
from .errors import QuantError, escaped
from .inspection.report import inspect
from .inspection.verify import verify
from .plan.advice import advise
from .progress import Progress
from .publish.bars import worker_bars
from .publish.job import Options
from .publish.plan import make_plan
from .publish.request import Request
from .publish.run import publish
from .recovery.recovery_lora import recover
from .statistics.calibration_file import read_calibration
from .statistics.importance import Importance
from .statistics.importance_file import read_importance

_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


class Report(Protocol):
    """The result of a command, which is printed as text or JSON."""

    def text(self) -> str: ...
    def json(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class BatchReport:
    """The reports of several converted files."""

    reports: Sequence[ConversionReport]

    def text(self) -> str:
        return "\n\n".join(report.text() for report in self.reports)

    def json(self) -> dict[str, Any]:
        return {"files": [report.json() for report in self.reports]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or 1 for an error or a failed check; argparse exits with 2."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], Report] = options.command
    try:
        report = command(options)
    except QuantError as error:
        _print(str(error), sys.stderr)
        return 1
    except KeyboardInterrupt:
        _print("interrupted", sys.stderr)
        return 1
    _print(json.dumps(report.json(), indent=2, allow_nan=False) if options.json else report.text(), sys.stdout)
    return 0 if getattr(report, "ok", True) else 1


def _print(text: str, file: TextIO) -> None:
    """Print a text; characters that the terminal's encoding does not have are escaped."""
    encoding = file.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=file, flush=True)
    except BrokenPipeError:  # whoever reads it, such as `head`, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())  # for the flush at the end of Python


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="quant", description="Make and inspect GGUF files of Wan models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (
        _add_convert,
        _add_publish,
        _add_inspect,
        _add_restore,
        _add_recover,
        _add_verify,
        _add_check,
        _add_advise,
    ):
        add(commands)
    return parser


def _add_convert(commands: _Commands) -> None:
    command = _add(commands, "convert", _convert, "make a GGUF or a file in a format of ComfyUI from a checkpoint")
    add_convert_options(command)


def _add_publish(commands: _Commands) -> None:
    summary = (
        "make all files of many checkpoints, with a manifest, sums and cards, in several processes or on a cluster"
    )
    command = _add(commands, "publish", _publish, summary)
    add_publish_options(command)


def _add_inspect(commands: _Commands) -> None:
    command = _add(commands, "inspect", _inspect, "show the types, sizes, errors and metadata of a GGUF file")
    command.add_argument("file", type=Path, metavar="FILE", help="a .gguf file, or the first part of a split one")


def _add_restore(commands: _Commands) -> None:
    command = _add(commands, "restore", _restore, "make a dequantized .safetensors file from a GGUF file")
    command.add_argument("file", type=Path, metavar="FILE", help="a .gguf file, or the first part of a split one")
    command.add_argument("destination", type=Path, metavar="DST", help="a .safetensors file")
    command.add_argument(
        "--dtype",
        default="BF16",
        type=str.upper,
        choices=DTYPES,
        help="the dtype of the dequantized tensors: BF16 (default), F16 or F32",
    )
    command.add_argument("--overwrite", action="store_true", help="replace an existing file")


def _add_recover(commands: _Commands) -> None:
    command = _add(commands, "recover", _recover, "make a LoRA that undoes a part of the error of a GGUF file")
    command.add_argument("file", type=Path, metavar="FILE", help="a .gguf file of a Wan model")
    command.add_argument("source", type=Path, metavar="SRC", help="the checkpoint that it was made from")
    command.add_argument("destination", type=Path, metavar="DST", help="a .safetensors file")
    command.add_argument("--size", type=float, required=True, metavar="GiB", help="the largest size of the LoRA in GiB")
    add_statistics_options(
        command, "the error of input channels that matter most is removed first", "like --imatrix, which it contains"
    )
    command.add_argument("--device", default="cpu", help="the device that computes: cpu (default), cuda, mps or xpu")
    add_options_of_source(command)
    command.add_argument("--overwrite", action="store_true", help="replace an existing file")


def _add_verify(commands: _Commands) -> None:
    command = _add(commands, "verify", _verify, "measure the error of a GGUF file against its source")
    command.add_argument("file", type=Path, metavar="FILE", help="a .gguf file")
    command.add_argument("source", type=Path, metavar="SRC", help="the checkpoint that it was made from")
    add_options_of_source(command)


def _add_check(commands: _Commands) -> None:
    _add(
        commands,
        "check",
        lambda _: check_installation(),
        "check the installation on a tiny model, which is also loaded and sampled where COMFYUI_PATH names a ComfyUI",
    )


def _add_advise(commands: _Commands) -> None:
    command = _add(
        commands,
        "advise",
        lambda options: advise(options.vram, options.ram),
        "say which file to use for each Wan model, with which budget, and the predicted peaks; needs ComfyUI's code",
    )
    for name, what in (("vram", "video memory of the GPU"), ("ram", "main memory")):
        command.add_argument(
            f"--{name}", type=float, default=0.0, metavar="GiB", help=f"{what} (default: this machine's)"
        )


def _add(
    commands: _Commands,
    name: str,
    run: Callable[[argparse.Namespace], Report],
    summary: str,
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=summary)
    command.set_defaults(command=run)
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    return command


@contextmanager
def _bar() -> Iterator[Progress]:
    with tqdm(unit="B", unit_scale=True, unit_divisor=1024, delay=0.5, file=sys.stderr) as bar:

        def progress(done: int, total: int, name: str) -> None:
            bar.total = total
            bar.set_postfix_str(escaped(name), refresh=False)
            bar.update(done - bar.n)

        yield progress


def _restore(options: argparse.Namespace) -> Report:
    with _bar() as progress:
        return restore(options.file, options.destination, options.dtype, overwrite=options.overwrite, progress=progress)


def _statistics(options: argparse.Namespace) -> Importance | None:
    """Return what is known of the layers' inputs, if a file was given."""
    if options.calibrate:
        return read_calibration(options.calibrate)
    return read_importance(options.imatrix) if options.imatrix else None


def _convert(options: argparse.Namespace) -> Report:
    batch = list_targets(
        options.source, options.destination, options.recipe, options.target_size, options.add_ons, options.loras
    )
    settings = Settings(
        effort=options.effort,
        importance=_statistics(options),
        device=options.device,
        overwrite=options.overwrite,
        five_d=options.patch_embedding == "5d",
        allow_non_finite=options.allow_non_finite,
        add_ons=options.add_ons,
        loras=options.loras,
    )
    reports: list[ConversionReport] = []
    for source, targets in batch.items():
        with _bar() as progress:
            reports += convert_all(source, targets, settings, progress=progress)
    return reports[0] if len(reports) == 1 else BatchReport(reports)


def _publish(options: argparse.Namespace) -> Report:
    request = Request(
        options.sources,
        options.out,
        options.recipe,
        options.target_size,
        options.calibrate_from,
        Options(
            options.effort,
            options.device,
            options.overwrite,
            options.allow_non_finite,
            tuple(options.add_ons),
            tuple(options.loras),
        ),
    )
    if options.plan:
        return make_plan(request.absolute())
    with worker_bars() as on_progress:
        return publish(
            request,
            workers=options.workers,
            ray=options.ray,
            on_plan=lambda plan: _print(plan.text(), sys.stderr),
            on_progress=on_progress,
        )


def _inspect(options: argparse.Namespace) -> Report:
    return inspect(options.file)


def _recover(options: argparse.Namespace) -> Report:
    with _bar() as progress:
        return recover(
            options.file,
            options.source,
            options.destination,
            options.size,
            importance=_statistics(options),
            add_ons=options.add_ons,
            loras=options.loras,
            device=options.device,
            overwrite=options.overwrite,
            progress=progress,
        )


def _verify(options: argparse.Namespace) -> Report:
    return verify(options.file, options.source, options.add_ons, options.loras)


if __name__ == "__main__":
    sys.exit(main())
