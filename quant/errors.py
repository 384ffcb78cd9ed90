"""The one exception of this package, and how text from files is shown."""

from __future__ import annotations

MAX_CHARS = 500
"""Characters of a message; a longer one loses its middle."""


class QuantError(ValueError):
    """Bad input.

    The message is one sentence, on one line: what, where, what was found, what was expected and what to do. It often
    repeats names and values of the bad input, so `printable` makes it safe to show.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str, limit: int = MAX_CHARS) -> str:
    """Return a text on one line, of at most `limit` characters, that a terminal, a log and a page can show.

    Control characters and lone surrogates are written as escapes, such as `\\n`. A long text loses its middle.
    """
    if len(text) > limit:
        keep = (limit - 5) // 2
        text = f"{text[:keep]} ... {text[-keep:]}"
    if not text.isprintable():
        text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
        return printable(text, limit) if len(text) > limit else text
    return text
