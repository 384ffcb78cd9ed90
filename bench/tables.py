"""The rows of the marked tables in the READMEs and in docs/, written from bench/results."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import reduce
from statistics import fmean
from typing import Any

from ..quant.plan.recipe import GGUF_RECIPES
from . import fits, publish_costs
from .harness import RESULTS, ROOT

PAGES = {
    "fits": (ROOT / "README.md",),
    "fits-zh": (ROOT / "README.zh.md",),
    "convert": (ROOT / "docs" / "formats.md",),
    "quality": (ROOT / "docs" / "quality.md",),
    "int8": (ROOT / "docs" / "quality.md",),
    "native": (ROOT / "docs" / "quality.md",),
    "tune": (ROOT / "docs" / "calibration.md",),
    "publish-model": (ROOT / "docs" / "publishing.md",),
    "publish-cluster": (ROOT / "docs" / "publishing.md",),
}
"""The pages that have the table after `<!-- table: NAME -->`, by NAME."""


def fits_rows() -> str:
    """Return what fits on GPUs of several sizes."""
    rows = json.loads((RESULTS / "fits-simulated.json").read_text())["rows"]
    return "".join(f"| {' | '.join(fits.cells(row))} |\n" for row in rows)


def chinese_fits_rows() -> str:
    """Return the same for a Chinese reader."""
    chinese = {"Wan Low VRAM, budget": "Wan 低显存，预算", "loader alone": "只用加载器"}  # noqa: RUF001
    return reduce(lambda rows, text: rows.replace(text, chinese[text]), chinese, fits_rows())


def tune_rows() -> str:
    """Return the distances from the full-precision model in dB, and how much tuning brings files closer."""
    lines = []
    for row in json.loads((RESULTS / "tune.json").read_text())["rows"]:
        cells = [row["recipe"]]
        for measure in ("velocity", "latent"):
            gain = row["gains"][measure]
            cells += [f"{row['thorough'][measure]:.1f}", f"{gain['mean']:+.2f} ± {gain['error']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |\n")
    return "".join(lines)


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
    found = {(row["recipe"], row["method"]): row for row in rows if row["recipe"] in GGUF_RECIPES}
    lines = []
    for recipe in (recipe for recipe, method in found if method == "plain"):
        networks = str(found[recipe, "plain"]["networks"])
        gains = [
            found.get((recipe, method), {"gains": {}})["gains"].get(measure)  # none without its peer
            for method in ("plain", "importance", "calibrated", "thorough")
            for measure in ("velocity", "latent")
        ]
        cells = (f"{gain['mean']:+.1f} ± {gain['error']:.1f}" if gain else "" for gain in gains)
        lines.append(f"| {' | '.join((recipe, networks, *cells))} |\n")
    return "".join(lines)


def int8_rows() -> str:
    """Return steps and clips in dB with exact products, what 8-bit products change, and the share of right clips."""
    rows = json.loads((RESULTS / "quality.json").read_text())["rows"]
    found = {(row["recipe"], row["method"]): row for row in rows}
    lines = []
    for recipe in (recipe for recipe, method in found if method == "int8"):
        exact, row = found[recipe, "plain"], found[recipe, "int8"]
        cells = [f"{fmean(exact['velocity_sqnr']):.1f}", f"{exact['latent_psnr']['mean']:.1f}"]
        gains = (row["gains"][measure] for measure in ("velocity", "latent"))
        cells += (f"{gain['mean']:+.1f} ± {gain['error']:.1f}" for gain in gains)
        cells += (f"{each['colour']:.0%}, {each['motion']:.0%}" for each in (exact, row))
        lines.append(f"| {' | '.join((recipe, *cells))} |\n")
    return "".join(lines)


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


TABLES: dict[str, Callable[[], str]] = {
    "fits": fits_rows,
    "fits-zh": chinese_fits_rows,
    "convert": convert_rows,
    "quality": quality_rows,
    "int8": int8_rows,
    "native": native_rows,
    "tune": tune_rows,
    "publish-model": publish_costs.model_rows,
    "publish-cluster": publish_costs.cluster_rows,
}
"""Functions that return the rows of a table, by NAME."""


def updated(text: str, name: str) -> str:
    """Return a page with the current rows of one table; the headings, which are translated, stay."""
    rows = TABLES[name]()
    pattern = rf"(<!-- table: {name} -->\n\|.*\n\|[-|]+\n)(?:\|.*\n)*"
    text, found = re.subn(pattern, lambda match: match[1] + rows, text)
    if found != 1:
        raise SystemExit(f"found {found} tables marked `<!-- table: {name} -->`, expected one: restore the mark")
    return text


def main() -> None:
    for name, pages in PAGES.items():
        for path in pages:
            path.write_text(updated(path.read_text(encoding="utf-8"), name), encoding="utf-8")


if __name__ == "__main__":
    main()
