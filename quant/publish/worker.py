"""The program of a worker process: a job a line on its input, progress and results as lines of JSON on its output."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from .job import Job, make

PACK = Path(__file__).resolve().parents[2]
COMMAND = [
    *(sys.executable, "-c"),
    # The publisher decides what an interruption ends, from the first import on.
    "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN);"
    " sys.path.insert(0, sys.argv[1]); from quant.publish.worker import main; main()",
    str(PACK),
]
_SECONDS_BETWEEN = 0.2


def main() -> None:
    """Make jobs until the input ends."""
    output = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints
    logging.disable(logging.WARNING)  # the results contain the warnings
    for line in sys.stdin:
        content = json.loads(line)
        results = make(Job.from_json(content["job"]), content["threads"], _Said(output))
        _say(output, {"results": [result.json() for result in results]})


class _Said:
    """Progress that is said now and then."""

    def __init__(self, output: TextIO) -> None:
        self._output, self._next = output, 0.0

    def __call__(self, done: int, total: int, name: str) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _SECONDS_BETWEEN
            _say(self._output, {"progress": [done, total, name]})


def _say(output: TextIO, content: dict[str, Any]) -> None:
    try:
        output.write(json.dumps(content) + "\n")
        output.flush()
    except BrokenPipeError:
        os._exit(1)  # the publisher was killed: as it, leave the unfinished files for the next run
