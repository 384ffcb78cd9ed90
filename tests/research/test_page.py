"""The tables of the research page equal the committed results."""

from __future__ import annotations

import json

from wanquant.testing.hosts import ROOT

FOLDER = ROOT / "research"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")


def results(name: str) -> dict:
    return json.loads((FOLDER / "results" / f"{name}.json").read_text())


def test_number_of_prompts():
    cells: dict[int, list[str]] = {}
    for point in results("importance-prompts")["points"]:
        sqnr = point["velocity_sqnr"]
        deviation = f" ± {sqnr['deviation']:.1f}" if point["prompts"] else ""
        cells.setdefault(point["prompts"], []).append(f"{sqnr['mean']:.1f}{deviation}")
    for count, values in cells.items():
        assert f"| {count} | {' | '.join(values)} |" in PAGE


def test_small_products():
    rows = {(row["type"], row["tokens"]): row for row in results("small-products")["rows"]}
    for name in {kind for kind, _ in rows}:
        measured = [(512, "tile_64_mib"), (512, "tile_1_mib"), (1, "tile_64_mib"), (1, "vec_dot")]
        cells = [f"{rows[name, n][key] / rows[name, n]['dense']:.2f}" for n, key in measured]
        assert f"| {name} | {' | '.join(cells)} |" in PAGE
