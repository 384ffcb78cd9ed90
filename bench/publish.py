"""Throughput of a publication with 1 and 2 workers, and on Ray, against conversions in sequence.

`others` counts the cores that other programs kept busy meanwhile. Where it is not near zero, the machine was shared,
and seconds say little; processor seconds still compare the work. `--costs` only calculates what 100 models cost.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from ..quant.conversion.batch import stem_of
from ..quant.plan.recipe import find_recipe
from ..testing.tiny_wan import write_tiny_wan
from . import harness, publish_costs
from .harness import GIB, ROOT, Row, machine

ONE_WORKER = "1 worker, 1 core"


def commands(sources: Sequence[Path], recipes: str, effort: str, folder: Path) -> dict[str, list[list[str]]]:
    """Return the arguments of `python -m quant` that make all files, by the name of the case."""
    options = ["--recipe", recipes, "--effort", effort]
    for name in ("sequence", "one", "two", "ray"):
        (folder / name).mkdir()
    names = [str(source) for source in sources]
    cases = {"convert in sequence": [["convert", name, str(folder / "sequence"), *options] for name in names]}
    cases[ONE_WORKER] = [["publish", *names, str(folder / "one"), *options, "--workers", "1"]]
    cases["2 workers"] = [["publish", *names, str(folder / "two"), *options, "--workers", "2"]]
    if importlib.util.find_spec("ray"):
        cases["Ray, this machine"] = [["publish", *names, str(folder / "ray"), *options, "--ray", "local"]]
    return cases


def measured(case: Sequence[Sequence[str]]) -> Row:
    """Run the commands of a case, and return its seconds, and those of the processors in it and outside of it."""
    started, own, busy = time.monotonic(), _own(), _busy()
    for arguments in case:
        command = [sys.executable, "-m", "quant", *arguments]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds, own, busy = time.monotonic() - started, _own() - own, _busy() - busy
    row: Row = {"seconds": round(seconds, 1)}
    if "--ray" in case[0]:  # whose processes are nobody's children
        return row
    return row | {"processor_seconds": round(own, 1), "others": round((busy - own) / seconds, 2)}


@contextmanager
def on_one_core(case: str) -> Iterator[None]:
    """Let the processes of one worker have one core, since a job that is alone would take all."""
    process = psutil.Process()
    cores = process.cpu_affinity()
    process.cpu_affinity(cores[:1] if case == ONE_WORKER else cores)
    try:
        yield
    finally:
        process.cpu_affinity(cores)


def _own() -> float:
    """Return the processor seconds of the ended processes that this one started, and of theirs."""
    times = os.times()
    return times.children_user + times.children_system


def _busy() -> float:
    """Return the processor seconds of all programs of this machine."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0)


def same_bytes(sources: Sequence[Path], recipes: str, folder: Path, cases: int) -> bool:
    """Return whether all cases have made the same files."""
    folders = ("one", "two", "ray")[: cases - 1]
    for source in sources:
        for recipe in recipes.split(","):
            name = f"{stem_of(source)}-{recipe}{find_recipe(recipe).suffix}"
            expected = (folder / "sequence" / name).read_bytes()
            if any((folder / each / stem_of(source) / name).read_bytes() != expected for each in folders):
                return False
    return True


def main() -> None:
    parser = harness.arguments(__doc__, update=harness.RESULTS / "publish.json")
    parser.add_argument("--sources", type=int, default=4, help="the number of checkpoints (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=1, help="the blocks of each (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=1536, help="the width of each (default: %(default)s)")
    parser.add_argument("--recipes", default="Q4_K_M,INT8", metavar="A,B")
    parser.add_argument("--effort", default="best", choices=["fast", "best"])
    parser.add_argument("--costs", action="store_true", help="only calculate the costs at true sizes")
    options = parser.parse_args()
    if options.costs:
        print(publish_costs.text())
        return
    with tempfile.TemporaryDirectory(prefix="wanquant-publish-") as name:
        folder = Path(name)
        shape: dict[str, Any] = {"layers": options.blocks, "dim": options.dim, "ffn_dim": 4 * options.dim}
        sources = [
            write_tiny_wan(folder / f"wan-{number}.safetensors", seed=number, **shape)
            for number in range(options.sources)
        ]
        nbytes = sum(source.stat().st_size for source in sources)
        cases = commands(sources, options.recipes, options.effort, folder)
        rows = []
        for case, each in cases.items():
            with on_one_core(case):
                rows.append({"case": case, **measured(each)})
        same = same_bytes(sources, options.recipes, folder, len(cases))
    for row in rows:
        row["source_mib_per_second"] = round(nbytes / row["seconds"] / (1 << 20), 2)
        row["throughput_against_sequence"] = round(rows[0]["seconds"] / row["seconds"], 2)
    result = {
        "machine": machine(),
        "sources": options.sources,
        "source_gib": round(nbytes / GIB, 3),
        "recipes": options.recipes,
        "effort": options.effort,
        "same_bytes": same,
        "rows": rows,
    }
    text = harness.table(list(rows[0]), harness.cells(rows, list(rows[0])))
    harness.conclude(options, result, f"{text}\n\nthe files of all cases are {'equal' if same else 'NOT EQUAL'}")


if __name__ == "__main__":
    main()
