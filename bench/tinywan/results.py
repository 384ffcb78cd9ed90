"""Where the measurements on TinyWan are kept, and how they are shown."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wanquant.bench.convert import machine
from wanquant.bench.tinywan.reference import CHECKPOINT
from wanquant.testing.hosts import ROOT

RESULTS, PICTURES = ROOT / "bench" / "results", ROOT / "docs" / "images"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--update", action="store_true", help="write its file of results, and its picture, anew")


def origin() -> dict[str, str]:
    """Where it was measured, and on what: the beginning of the checkpoint's SHA-256."""
    return {"machine": machine(), "checkpoint": hashlib.sha256(CHECKPOINT.read_bytes()).hexdigest()[:16]}


def conclude(options: argparse.Namespace, path: Path, result: Mapping[str, Any], shown: str) -> None:
    """Writes and prints as `add_options` offers."""
    if options.update:
        write_results(path, result)
    print(json.dumps(result, indent=2) if options.json else shown)


def write_results(path: Path, result: Mapping[str, Any]) -> None:
    """As JSON, to three decimals, with a line for each row."""
    lines = [f" {json.dumps(key)}: {_value(value)}" for key, value in _rounded(result).items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _value(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in value) + "\n ]"
    return json.dumps(value)


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return round(value, 3) if isinstance(value, float) else value
