"""Throughput of a publication with 1 and 2 workers, and on Ray, against conversions in sequence."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..quant.conversion.batch import stem_of
from ..quant.plan.recipe import find_recipe
from ..testing.tiny_wan import write_tiny_wan
from . import harness
from .harness import GIB, ROOT, machine


def commands(sources: Sequence[Path], recipes: str, effort: str, folder: Path) -> dict[str, list[list[str]]]:
    """Return the arguments of `python -m quant` that make all files, by the name of the case."""
    options = ["--recipe", recipes, "--effort", effort]
    for name in ("sequence", "one", "two", "ray"):
        (folder / name).mkdir()
    names = [str(source) for source in sources]
    cases = {"convert in sequence": [["convert", name, str(folder / "sequence"), *options] for name in names]}
    cases["1 worker"] = [["publish", *names, str(folder / "one"), *options, "--workers", "1"]]
    cases["2 workers"] = [["publish", *names, str(folder / "two"), *options, "--workers", "2"]]
    if importlib.util.find_spec("ray"):
        cases["Ray, this machine"] = [["publish", *names, str(folder / "ray"), *options, "--ray", "local"]]
    return cases


def seconds_of(case: Sequence[Sequence[str]]) -> float:
    started = time.monotonic()
    for arguments in case:
        command = [sys.executable, "-m", "quant", *arguments]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.monotonic() - started


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
    parser.add_argument("--blocks", type=int, default=4, help="the blocks of each (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=1536, help="the width of each (default: %(default)s)")
    parser.add_argument("--recipes", default="Q4_K_M,Q8_0,INT8", metavar="A,B")
    parser.add_argument("--effort", default="best", choices=["fast", "best"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="wanquant-publish-") as name:
        folder = Path(name)
        shape: dict[str, Any] = {"layers": options.blocks, "dim": options.dim, "ffn_dim": 4 * options.dim}
        sources = [
            write_tiny_wan(folder / f"wan-{number}.safetensors", seed=number, **shape)
            for number in range(options.sources)
        ]
        nbytes = sum(source.stat().st_size for source in sources)
        cases = commands(sources, options.recipes, options.effort, folder)
        seconds = {case: seconds_of(each) for case, each in cases.items()}
        same = same_bytes(sources, options.recipes, folder, len(cases))
    first = seconds["convert in sequence"]
    rows = [
        {
            "case": case,
            "seconds": round(each, 1),
            "source_mib_per_second": round(nbytes / each / (1 << 20), 2),
            "throughput_against_sequence": round(first / each, 2),
        }
        for case, each in seconds.items()
    ]
    result = {
        "machine": machine(),
        "sources": options.sources,
        "source_gib": round(nbytes / GIB, 3),
        "recipes": options.recipes,
        "effort": options.effort,
        "same_bytes": same,
        "rows": rows,
    }
    text = harness.table(list(rows[0]), [list(row.values()) for row in rows])
    harness.conclude(options, result, f"{text}\n\nthe files of all cases are {'equal' if same else 'NOT EQUAL'}")


if __name__ == "__main__":
    main()
