"""The one exception of this package."""

from __future__ import annotations


class QuantError(ValueError):
    """Bad input. The message says in one sentence what, where, what was found, what was expected and what to do."""
