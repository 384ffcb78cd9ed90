"""Progress, the type of functions that report how much of a file has been read."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Takes the source bytes done, all source bytes and the tensor's name; it may raise any exception to stop."""
