"""Progress: what reports how far a file has been read."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called with source bytes done, source bytes in all and the tensor's name; may raise anything to stop."""
