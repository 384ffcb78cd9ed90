"""The rows of the README's marked tables, written from bench/results into both languages."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from statistics import fmean
from typing import Any

from ..quant.plan.recipe import GGUF_RECIPES
from .harness import RESULTS, ROOT

READMES = (ROOT / "README.md", ROOT / "README.zh.md")


def convert_row(row: dict[str, Any]) -> str:
    """Return errors relative to ggml's, and speeds as multiples of ggml's."""
    errors = (f"{100 * error:+.1f} %" if (error := row[f"{what}_error"]) else "0" for what in ("fast", "best", "file"))
    speeds = (f"{row[f'{effort}_mws'] / row['ggml_mws']:.2f}x" for effort in ("fast", "best"))
    return f"| {' | '.join((row['type'], *errors, *speeds))} |\n"


def convert_rows() -> str:
    result = json.loads((RESULTS / "convert-14B.json").read_text())
    return "".join(map(convert_row, result["encoders"]))


def quality_rows() -> str:
    """Return the gains of steps and clips over the peers in dB, one line per recipe."""
    rows = json.loads((RESULTS / "quality.json").read_text())["rows"]
    gains: dict[str, list[str]] = {}
    for row in rows:
        if row["recipe"] in GGUF_RECIPES and row["method"] in ("plain", "importance", "calibrated", "thorough"):
            found = [row["gains"].get(measure) for measure in ("velocity", "latent")]  # none if ggml cannot make it
            cells = (f"{gain['mean']:+.1f} ± {gain['error']:.1f}" if gain else "" for gain in found)
            gains.setdefault(row["recipe"], []).extend(cells)
    return "".join(f"| {' | '.join((recipe, *cells))} |\n" for recipe, cells in gains.items())


def native_rows() -> str:
    """Return the size, steps and clips of ComfyUI's own formats by kitchen in dB, and our gains over these."""
    rows = json.loads((RESULTS / "quality.json").read_text())["rows"]
    found = {(row["recipe"], row["method"]): row for row in rows}
    lines = []
    for recipe in (recipe for recipe, method in found if method == "kitchen"):
        row = found[recipe, "kitchen"]
        cells = [
            f"{row['nbytes'] / 1e6:.2f}",
            f"{fmean(row['velocity_sqnr']):.1f}",
            f"{row['latent_psnr']['mean']:.1f}",
        ]
        for method in ("plain", "calibrated"):
            gains = (found[recipe, method]["gains"][measure] for measure in ("velocity", "latent"))
            cells += (f"{gain['mean']:+.1f} ± {gain['error']:.1f}" for gain in gains)
        lines.append(f"| {' | '.join((recipe, *cells))} |\n")
    return "".join(lines)


TABLES: dict[str, Callable[[], str]] = {"convert": convert_rows, "quality": quality_rows, "native": native_rows}
"""Functions that return the rows of the table after `<!-- table: NAME -->`, by NAME."""


def updated(text: str) -> str:
    """Return a README with current rows; the headings, which are translated, stay."""
    for name, rows in TABLES.items():
        pattern = rf"(<!-- table: {name} -->\n\|.*\n\|[-|]+\n)(?:\|.*\n)*"
        text, found = re.subn(pattern, lambda match, rows=rows: match[1] + rows(), text)
        if found != 1:
            raise SystemExit(
                f"README: found {found} tables marked `<!-- table: {name} -->`, expected one: restore the mark"
            )
    return text


def main() -> None:
    for path in READMES:
        path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
