"""Every refusal ends with what to do: the last clause of each message is an instruction, or says what to replace."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
INSTRUCTIONS = (
    "add|allow|allocate|change|check|choose|close|collect|connect|convert|copy|create|declare|delete|download|free|get"
    "|give|install|leave|load|merge|pass|put|remove|rename|repair|restart|run|sample|save|set|shorten|start|try|turn"
    "|update|use|view|wait|write"
)
REMEDY = re.compile(rf"(^|[;:,] |\bor )({INSTRUCTIONS})\b[^;]*$")
# Clauses that another function or constant makes, which ends with a remedy itself.
NAMED = re.compile(
    r"\{(advice|remedy|problem|error|useless|kind|_?ADVICE|_?HOW|_?DAMAGED|str\(error\)|_kind\(.*|_refusal\(.*"
    r"|_absence\(.*|incompatibility_message\(.*|next\(.*|first|found\['refused'\]|_left\(.*)\}"
)
MAKERS = ("QuantError", "_tensor_error", "error")
"""QuantError, and what adds the name of a file to a message that is raised."""


def _text(node: ast.expr) -> str:
    """The text of an expression, with `{code}` for what only a run can tell; of alternatives, the last."""
    match node:
        case ast.Constant():
            return str(node.value)
        case ast.JoinedStr():
            return "".join(map(_text, node.values))
        case ast.FormattedValue():
            return f"{{{ast.unparse(node.value)}}}"
        case ast.BinOp():
            return _text(node.left) + _text(node.right)
        case ast.IfExp():
            return _text(node.orelse)
    return f"{{{ast.unparse(node)}}}"


def _messages() -> Iterator[tuple[str, str]]:
    """Where, and the text, of each message that becomes a QuantError."""
    for path in sorted(path for folder in ("nodes", "ops", "quant") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            made = node.exc if isinstance(node, ast.Raise) else node
            if isinstance(made, ast.Call) and made.args and _name(made) in (MAKERS if made is not node else MAKERS[:1]):
                yield f"{path.relative_to(ROOT)}:{made.lineno}", " ".join(map(_text, made.args))


def _name(call: ast.Call) -> str:
    return getattr(call.func, "id", getattr(call.func, "attr", ""))


MESSAGES = dict(_messages())


def test_there_are_messages():
    assert len(MESSAGES) > 250


@pytest.mark.parametrize("where", MESSAGES)
def test_message_ends_with_what_to_do(where: str):
    text = MESSAGES[where]
    assert REMEDY.search(text) or NAMED.search(text), text
