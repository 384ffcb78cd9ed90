"""Tasks of a long benchmark, whose results are kept one by one, so that a stopped run goes on where it was."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from wanquant.bench.harness import Row, write_row

Task = tuple[Any, ...]


class Kept:
    """The results of tasks in a folder, one file of JSON each.

    Args:
        folder: made at the first `put`.
        settings: what all results depend on.
    """

    def __init__(self, folder: Path, settings: Row) -> None:
        self.folder, self.settings = folder, settings

    def get(self, name: str) -> Any:
        """Return the result of a task, or None if there is none.

        Raises:
            SystemExit: it was measured with other settings.
        """
        path = self._path(name)
        if not path.exists():
            return None
        content = json.loads(path.read_text())
        if content["settings"] != self.settings:
            found = content["settings"]
            raise SystemExit(
                f"{path}: measured with {found}, expected {self.settings}; give another folder or delete it"
            )
        return content["result"]

    def put(self, name: str, result: object) -> None:
        """Keep a result that JSON can hold."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self._path(name).with_suffix(".part")
        part.write_text(json.dumps({"settings": self.settings, "result": result}))
        part.replace(self._path(name))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options `--jobs` and `--record`."""
    parser.add_argument("--jobs", type=int, default=1, help="processes; with several, set OMP_NUM_THREADS=1")
    parser.add_argument("--record", type=Path, help="JSON lines of finished tasks; those in it are not run again")


def run(function: Callable[..., Row], tasks: Sequence[Task], jobs: int = 1, record: Path | None = None) -> list[Row]:
    """Run a function for the arguments of each task.

    Args:
        function: of a module, with arguments and a result that JSON can hold.
        record: a file of JSON lines, to which the result of each task is appended as soon as it is there.

    Returns:
        the results in the order of the tasks.
    """
    done: dict[Task, Row] = {}
    if record and record.exists():
        done = {tuple(row["task"]): row["result"] for row in map(json.loads, record.read_text().splitlines())}
    missing = [task for task in tasks if task not in done]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        futures = {pool.submit(function, *task): task for task in missing}
        for future in as_completed(futures):
            task = futures[future]
            done[task] = future.result()
            print(f"{len(done)} of {len(tasks)}: {' '.join(map(str, task))}", file=sys.stderr, flush=True)
            if record:
                with record.open("a") as file:
                    write_row(file, {"task": task, "result": done[task]})
    return [done[task] for task in tasks]
