"""What a node of a cluster runs.

Ray carries these functions by value: they import nothing but the standard library until they know that the pack is
there. A node whose pack is elsewhere names that folder in the environment variable WANQUANT_PATH.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

SECONDS_BETWEEN = 0.5
PATH_VARIABLE = "WANQUANT_PATH"


def pack_on_node(pack: str) -> str:
    """Return the folder of the pack on this node, which is `pack` on the publisher's machine."""
    return os.environ.get(PATH_VARIABLE) or pack


def digest_of_code(pack: str) -> str:
    """Return a SHA-256 of the pack's code that converts; empty if it is not there."""
    folder, digest = Path(pack, "quant"), hashlib.sha256()
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))
    for name in files:
        digest.update(name.encode() + b"\0" + Path(folder, name).read_bytes())
    return digest.hexdigest() if files else ""


def versions_of_libraries() -> str:
    """Return the releases of PyTorch and NumPy, or why they cannot be imported."""
    modules = ("torch", "numpy")
    try:
        releases = [str(importlib.import_module(name).__version__).partition("+")[0] for name in modules]
        return " and ".join(map(" ".join, zip(modules, releases, strict=True)))
    except ImportError as error:
        return str(error)


def fault_of_node(expected: Mapping[str, Any]) -> str:
    """Return why this node cannot help, as a part of a sentence; empty if it can.

    Args:
        expected: `pack`, `digest` and `versions` of the publisher's machine; `files`, the paths and sizes in bytes of
            files that it sees; and `token`, the path and the text of a file in its folder for the results.
    """
    pack = pack_on_node(expected["pack"])
    digest = digest_of_code(pack)
    if not digest:
        return f"has no WanQuant at {pack}; put it there, or name its folder in {PATH_VARIABLE}"
    if digest != expected["digest"]:
        return f"has another version of WanQuant at {pack}; update it to that of the publisher's machine"
    versions = versions_of_libraries()
    if versions != expected["versions"]:
        return f"has {versions}, expected {expected['versions']}, which give the same bytes; install those"
    path, token = expected["token"]
    try:
        seen = Path(path).read_text(encoding="utf-8")
    except OSError:
        seen = ""
    if seen != token:
        return f"does not see the folder {Path(path).parent} of the publisher's machine; share it under this path"
    for path, nbytes in expected["files"]:
        if not os.path.exists(path) or os.path.getsize(path) != nbytes:
            return f"does not see {path} of the publisher's machine; share its folder under this path"
    return ""


class Board:
    """An actor with the latest progress of each job."""

    def __init__(self) -> None:
        self._latest: dict[int, tuple[int, int, str]] = {}

    def tell(self, job: int, done: int, total: int, name: str) -> None:
        """Take the source bytes done, all source bytes and the tensor's name of a job."""
        self._latest[job] = (done, total, name)

    def news(self) -> dict[int, tuple[int, int, str]]:
        """Return what was told since the last call, by the number of the job."""
        latest, self._latest = self._latest, {}
        return latest


class Teller:
    """The progress of a job, told to a board now and then."""

    def __init__(self, board: Any, job: int) -> None:  # noqa: ANN401
        self._board, self._job, self._next = board, job, 0.0

    def __call__(self, done: int, total: int, name: str) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + SECONDS_BETWEEN
            self._board.tell.remote(self._job, done, total, name)


def make_on_node(
    pack: str, job: Mapping[str, Any], threads: int, progress: Callable[[int, int, str], None] | None
) -> Sequence[Mapping[str, Any]]:
    """Make a job with the pack of this node, and return its results as plain values."""
    folder = pack_on_node(pack)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    jobs = importlib.import_module("quant.publish.job")
    return [result.json() for result in jobs.make(jobs.Job.from_json(job), threads, progress)]
