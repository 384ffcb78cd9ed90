"""QuantError, the only exception that this package defines."""

from __future__ import annotations


class QuantError(ValueError):
    """An error in the input; its message says what is wrong, where, what was found and expected, and what to do."""
