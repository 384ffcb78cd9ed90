"""Machine description, ComfyUI, timing, tables and options of all benchmarks; imports neither torch nor ComfyUI."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from wanquant.testing.hosts import ROOT, checkout

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GIB = 1 << 30
SIMULATED = "no GPU: simulated on meta tensors (torch 2.13, ComfyUI 0.30.0)"
RESULTS, PICTURES = ROOT / "bench" / "results", ROOT / "docs" / "images"
Row = dict[str, Any]


def machine() -> str:
    """Return processor, cores, threads, system, torch, and ComfyUI if it is imported, in one line."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    processor = next(names, "") or platform.processor() or platform.machine()
    parts = [processor, f"{os.cpu_count()} cores", f"{torch.get_num_threads()} threads", platform.system()]
    parts.append(f"torch {torch.__version__}")
    if "comfy" in sys.modules:
        from comfyui_version import __version__

        parts.append(f"ComfyUI {__version__}")
    return ", ".join(parts)


def gpu_machine() -> Row:
    """Return the GPU (None without one), the time and the versions, as the first row of a GPU benchmark."""
    import torch

    row: Row = {"case": "machine", "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}
    row |= {"time": time.strftime("%Y-%m-%d %H:%M"), "python": platform.python_version(), "torch": torch.__version__}
    return row


def import_comfyui(*, cpu: bool = True) -> None:
    """Make ComfyUI importable, on the CPU or on its own choice of device."""
    from wanquant.testing.host_shims import install

    install()
    sys.path.insert(0, str(checkout()))
    from comfy.cli_args import args

    args.cpu = cpu


def fastest(
    seconds: float, *calls: Callable[[], object], clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Return the milliseconds of the fastest run of each call; see `in_turns`."""
    return [min(times) for times in in_turns(seconds, *calls, clock=clock)]


def in_turns(
    seconds: float, *calls: Callable[[], object], clock: Callable[[], float] = time.perf_counter, least: int = 3
) -> list[list[float]]:
    """Return the milliseconds of all runs of each call.

    The calls take turns, at least `least` times each, so that all of them see the same load of the machine.
    """
    times: list[list[float]] = [[] for _ in calls]
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(times[0]) < least:
        for call, seen in zip(calls, times, strict=True):
            started = clock()
            call()
            seen.append((clock() - started) * 1e3)
    return times


@contextmanager
def sampled(read: Callable[[], int], interval: float) -> Iterator[list[int]]:
    """Yield a list that a thread extends by what `read` returns, every `interval` seconds."""
    values, done = [read()], threading.Event()

    def watch() -> None:
        while not done.wait(interval):
            values.append(read())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield values
    finally:
        done.set()
        thread.join()


def table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (head, *rows)]
    return "\n".join((lines[0], "|---" * len(head) + "|", *lines[1:]))


def new_figure(width: float, height: float) -> Figure:
    """Return an empty white figure of this size in inches."""
    # pyplot would keep every figure and choose a window system. The import is slow.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=100, layout="constrained", facecolor="white")


def cells(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> list[list[object]]:
    """Return the values of some keys, empty where a row lacks one."""
    return [[row.get(column, "") for column in columns] for row in rows]


def arguments(
    description: str | None, *, threads: int | None = None, update: Path | None = None
) -> argparse.ArgumentParser:
    """Return a parser with the options that benchmarks share.

    Args:
        threads: the default of `--threads`, which is left out if this is None.
        update: the results file that `--update` writes; the option is left out if this is None.
    """
    script = Path(sys.argv[0])
    prog = f"python3 -m research {script.stem}"
    if script.parent.name != "research":
        prog = f"dev.py bench {script.stem.replace('_', '-')}"
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    if threads:
        parser.add_argument("--threads", type=int, default=threads)
    if update:
        parser.add_argument("--update", action="store_const", const=update, help="also write the committed results")
    return parser


def conclude(options: argparse.Namespace, result: Mapping[str, Any] | Sequence[Any], text: str) -> None:
    """Print the result as `text` or JSON, and write it, as the options of `arguments` say."""
    if path := getattr(options, "update", None):
        lines = [f" {json.dumps(key)}: {_lines(value)}" for key, value in _rounded(result).items()]
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(json.dumps(result, indent=1) if options.json else text)


def write_row(file: TextIO, row: Row) -> None:
    """Append a line of JSON that survives a crash right after it."""
    file.write(json.dumps(row) + "\n")
    file.flush()
    if file.fileno() > 2:
        os.fsync(file.fileno())


def _lines(value: Any) -> str:
    """Return JSON with one line per row of a list."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in value) + "\n ]"
    return json.dumps(value)


def _rounded(value: Any) -> Any:
    """Round all floats to three decimals."""
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return round(value, 3) if isinstance(value, float) else value
