"""Devices: whether one is usable, and allocations on one that outlive the sampling step in which they are made.

Such allocations are the tables of formats and loaded kernels. A host that plans the memory of a step in advance, or
records it in a graph, must leave them out. `allocate_within` sets the context in which they are made.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch

from .errors import QuantError

P = ParamSpec("P")
R = TypeVar("R")

_context: Callable[[], AbstractContextManager[object]] = nullcontext


class _Thread(threading.local):
    within = False


_thread = _Thread()


def allocate_within(context: Callable[[], AbstractContextManager[object]]) -> None:
    """Make all later lasting allocations within a context manager that `context` returns anew each time."""
    global _context
    _context = context


def usable_device(device: str | torch.device) -> torch.device:
    """Return the device with its index.

    Raises:
        QuantError: torch cannot allocate on it.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch raises AssertionError where it was built without CUDA
        raise QuantError(f"device {device}: not usable here ({str(error).splitlines()[0]}); use cpu") from error


def has_float64(device: torch.device) -> bool:
    """Return whether a device computes in float64, which those of Apple and some of Intel do not."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (RuntimeError, TypeError):
        return False
    return True


@contextmanager
def lasting_allocations() -> Iterator[None]:
    """Mark allocations that outlive the step; an inner context has no effect, since hosts cannot nest theirs."""
    if _thread.within:
        yield
        return
    _thread.within = True
    try:
        with _context():
            yield
    finally:
        _thread.within = False


def cached_on_device(make: Callable[P, R]) -> Callable[P, R]:
    """Cache the results of a function for each combination of its arguments, among which is the device."""

    @cache
    @wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> R:
        with lasting_allocations():
            return make(*args, **kwargs)

    return made  # type: ignore[return-value]
