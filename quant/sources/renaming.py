"""Renaming of tensors by a table of rules; the first rule whose pattern matches the start of a name is applied."""

from __future__ import annotations

import re
from collections.abc import Sequence

Rule = tuple[re.Pattern[str], str]


def rules(*pairs: tuple[str, str]) -> Sequence[Rule]:
    """Compile pairs of a pattern and its replacement."""
    return [(re.compile(pattern), replacement) for pattern, replacement in pairs]


def rename(name: str, table: Sequence[Rule]) -> str | None:
    """Return the new name, or None if no pattern matches; what follows the match (`weight`, a scale) is kept."""
    for pattern, replacement in table:
        match = pattern.match(name)
        if match:
            return match.expand(replacement) + name[match.end() :]
    return None
