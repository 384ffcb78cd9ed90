"""Memory of a device that outlives the call which takes it: tables of decoders, and kernels as they are loaded.

A host that plans the memory of a step ahead must leave these out of its plan, and says how by `allocate_within`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_context: Callable[[], AbstractContextManager[object]] = nullcontext


class _Thread(threading.local):
    within = False


_thread = _Thread()


def allocate_within(context: Callable[[], AbstractContextManager[object]]) -> None:
    """From now on, what lasts is allocated within a context that `context` makes each time."""
    global _context
    _context = context


@contextmanager
def lasting() -> Iterator[None]:
    """While open, what is allocated may outlive the step. Within another one it changes nothing: hosts do not nest."""
    if _thread.within:
        yield
        return
    _thread.within = True
    try:
        with _context():
            yield
    finally:
        _thread.within = False


def kept(make: Callable[P, R]) -> Callable[P, R]:
    """A function whose results are made once for each of its arguments, among them the device, and kept."""

    @cache
    @wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> R:
        with lasting():
            return make(*args, **kwargs)

    return made  # type: ignore[return-value]
