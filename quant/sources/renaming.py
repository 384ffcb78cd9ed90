"""Renaming by a table: the first pattern that a name starts with is replaced."""

from __future__ import annotations

import re
from collections.abc import Sequence

Rule = tuple[re.Pattern[str], str]


def rules(*pairs: tuple[str, str]) -> Sequence[Rule]:
    """Compiles (pattern, replacement)."""
    return [(re.compile(pattern), replacement) for pattern, replacement in pairs]


def rename(name: str, table: Sequence[Rule]) -> str | None:
    """The new name, or None where no pattern matches. What follows the match (`weight`, a scale) is kept."""
    for pattern, replacement in table:
        match = pattern.match(name)
        if match:
            return match.expand(replacement) + name[match.end() :]
    return None
