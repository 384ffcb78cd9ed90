"""A progress bar for each worker, on a terminal."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from ..errors import escaped
from .processes import OnProgress


@contextmanager
def worker_bars() -> Iterator[OnProgress]:
    """Yield a function that shows a bar for each worker; several threads may call it."""
    bars: dict[int, Any] = {}
    lock = threading.Lock()

    def progress(worker: int, done: int, total: int, name: str) -> None:
        with lock:
            if worker not in bars:
                bars[worker] = tqdm(position=worker, unit="B", unit_scale=True, unit_divisor=1024, file=sys.stderr)
            bar = bars[worker]
            bar.total = total
            bar.set_postfix_str(escaped(name), refresh=False)
            bar.update(done - bar.n)

    try:
        yield progress
    finally:
        for bar in bars.values():
            bar.close()
