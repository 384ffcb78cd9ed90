"""JSON from files that may be hostile: how many values it has is known before any of them is made."""

from __future__ import annotations

import json
from typing import Any

from ..errors import QuantError

MAX_VALUES = 1 << 20
"""The most commas, colons and brackets of a text, since each may become a Python object; Wan 14B has 14,000."""
_STRUCTURE = (",", ":", "[", "{")
_MAX_DIGITS = 20


def parse_json(data: str | bytes, where: str, advice: str) -> Any:  # noqa: ANN401
    """Return the value of a JSON text in which no table has a name twice.

    Args:
        data: the text; bytes are UTF-8.
        where: the file, and what of it this is.
        advice: what to do if the text is not JSON.

    Raises:
        QuantError: the text is not JSON, repeats a name, is nested too deeply, or has too many or too long values.
    """
    try:
        text = data.decode() if isinstance(data, bytes) else data
        if (size := count_values(text)) > MAX_VALUES:
            raise ValueError(f"{size} commas, colons and brackets, expected at most {MAX_VALUES}")
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse, parse_int=_integer)
    except (ValueError, RecursionError) as error:
        raise QuantError(f"{where} is not JSON ({error}); {advice}") from None


def count_values(text: str) -> int:
    """Return the number of commas, colons and brackets, which is at least that of the values but one."""
    return sum(map(text.count, _STRUCTURE))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {twice} occurs twice")
    return table


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits, expected at most {_MAX_DIGITS}")
    return int(digits)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON value")
