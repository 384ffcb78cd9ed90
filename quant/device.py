"""Devices: which one is usable, and memory on one that outlives the step in which it is allocated.

Such memory holds the tables of formats and loaded kernels. A host that plans the memory of a step ahead must leave it
out of its plan; `allocate_within` tells this module how.
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
    """From now on, what lasts is allocated within a context that `context` makes each time."""
    global _context
    _context = context


def usable_device(device: str | torch.device) -> torch.device:
    """Return the device, with its index.

    Raises:
        QuantError: torch cannot allocate on it.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch raises AssertionError where it was built without CUDA
        raise QuantError(f"device {device}: not usable here ({str(error).splitlines()[0]}); use cpu") from error


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
