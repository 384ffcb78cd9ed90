"""Devices: what one can do, how much fits, and allocations that outlive the sampling step in which they are made.

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

# Elements to quantize at a time on a CPU: the temporaries then stay in its cache.
_CPU_ELEMENTS = 1 << 18
# On an accelerator, the more at a time, the faster, because there are many small operations. A search keeps up to 100
# bytes of temporaries for each element. It may use half of the free memory.
_DEVICE_ELEMENTS = 1 << 22
_MOST_DEVICE_ELEMENTS = 1 << 24
_FREE_BYTES_AN_ELEMENT = 256

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


def is_hopper(device: torch.device) -> bool:
    """Return whether a device is an NVIDIA GPU like the H100; some of AMD report the same capability."""
    is_nvidia = device.type == "cuda" and bool(torch.version.cuda) and torch.cuda.is_available()
    return is_nvidia and torch.cuda.get_device_capability(device) == (9, 0)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, because the last bits of what BLAS and LAPACK return depend on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def free_bytes(device: torch.device) -> int | None:
    """Return the memory of a device that this process can still allocate, or None where torch cannot tell."""
    if device.type != "cuda":
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + cached


def elements_at_a_time(device: torch.device) -> int:
    """Return how many elements to quantize at a time."""
    if device.type == "cpu":
        return _CPU_ELEMENTS
    free = free_bytes(device)
    return _DEVICE_ELEMENTS if free is None else max(1, min(free // _FREE_BYTES_AN_ELEMENT, _MOST_DEVICE_ELEMENTS))


def has_float8(device: torch.device) -> bool:
    """Return whether a device converts to and from FP8, which those of Apple do not."""
    try:
        torch.ones(1, device=device).to(torch.float8_e4m3fn).float()
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
