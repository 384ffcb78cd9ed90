"""JSON from files that may be hostile."""

from __future__ import annotations

import json
from typing import Any

from ..errors import QuantError


def parse_json(data: str | bytes, where: str, advice: str) -> Any:  # noqa: ANN401
    """Return the value of a JSON text in which no table has a name twice.

    Args:
        data: the text; bytes are UTF-8.
        where: the file, and what of it this is.
        advice: what to do if the text is not JSON.

    Raises:
        QuantError: the text is not JSON, repeats a name, or is nested too deeply.
    """
    try:
        return json.loads(data, object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise QuantError(f"{where} is not JSON ({error}); {advice}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {twice} occurs twice")
    return table


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON value")
