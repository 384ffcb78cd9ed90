"""The one exception of this package, and how text from files is shown."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    _Adapter = logging.LoggerAdapter[logging.Logger]
else:
    _Adapter = logging.LoggerAdapter  # Python 3.10 cannot subscript it

MAX_CHARS = 500
"""Characters of a message; a longer one loses its middle."""


class QuantError(ValueError):
    """Bad input.

    The message is one sentence, on one line: what, where, what was found, what was expected and what to do. It often
    repeats names and values of the bad input, so `printable` makes it safe to show.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class FileInUseError(QuantError):
    """A file that another process is writing, which may end at any time."""


def printable(text: str, limit: int = MAX_CHARS) -> str:
    """Return a text on one line, of at most `limit` characters, that a terminal, a log and a page can show.

    Control characters and lone surrogates are written as escapes, such as `\\n`. A long text loses its middle.
    """
    if len(text) > limit:
        keep = (limit - 5) // 2
        text = f"{text[:keep]} ... {text[-keep:]}"
    shown = escaped(text)
    return printable(shown, limit) if len(shown) > limit else shown


def escaped(text: str) -> str:
    """Return a text of any length on one line, with control characters and lone surrogates as escapes."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def printable_lines(lines: Iterable[str]) -> str:
    """Return a text of these lines; names within them add no line and no control character."""
    return "\n".join(map(escaped, lines))


class PrintableLog(_Adapter):
    """A logger of one module, whose messages are printable whatever names they contain."""

    def __init__(self, name: str) -> None:
        super().__init__(logging.getLogger(name), {})

    def log(self, level: int, msg: object, *args: object, **options: Any) -> None:  # noqa: ANN401
        if self.isEnabledFor(level):
            message = str(msg) % args if args else str(msg)
            super().log(level, "%s", escaped(message), **{"stacklevel": 2, **options})
