"""The tables of the READMEs and of docs/ equal the output of their commands, and links lead somewhere."""

from __future__ import annotations

import json
import re

import pytest
import torch

from wanquant.bench import dequant, sizes, tables
from wanquant.quant import QTYPES
from wanquant.quant.plan.recipe import RECIPES
from wanquant.testing.hosts import ROOT


def test_size_table_is_current(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["sizes"])
    sizes.main()
    assert capsys.readouterr().out in page("formats")


def test_speed_table_is_that_of_the_results_and_counts_as_today():
    pytest.importorskip("triton", reason="Triton's wheels are for Linux")
    rows = json.loads((ROOT / "bench" / "results" / "dequant-epyc-2026-11-23.json").read_text())["rows"]
    fused = [row for row in rows if row["ours"]["kernels"] == 1]
    for row in fused:
        quant = QTYPES[row["type"]]
        packed = torch.zeros(quant.packed_shape((64, 4096)), dtype=torch.uint8)
        assert dequant.our_traffic(quant, packed) == row["ours"]
    of_grids = {row["type"]: row["ours"]["bytes"] for row in fused if "peer" not in row}
    assert len(of_grids) == 7
    assert f"{min(of_grids.values()):.2f} to {max(of_grids.values()):.2f} bytes" in page("speed")
    in_table = [row for row in fused if "peer" in row]
    assert len(in_table) == 12
    for row in in_table:
        ours, peer = row["ours"], row["peer"]
        counts = f"{ours['kernels']} | {ours['bytes']:.2f} | {peer['kernels']} | {peer['bytes']:.2f}"
        line = f"| {row['type']} | {counts} | {row['of_peer']}x ({row['torch_of_peer']}x) |"
        assert line in page("speed")


@pytest.mark.parametrize(
    ("name", "path"), [(name, path) for name, paths in tables.PAGES.items() for path in paths], ids=str
)
def test_tables_are_those_of_the_results(name, path):
    text = path.read_text(encoding="utf-8")
    assert tables.updated(text, name) == text, "run python3 dev.py bench tables"
    first = tables.TABLES[name]().splitlines(keepends=True)[0]
    stale = text.replace(first, "")
    assert stale != text and tables.updated(stale, name) == text


def page(name):
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def test_readme_is_short_and_counts_the_recipes():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 1200 and len(text.splitlines()) <= 150
    assert f"[All {len(RECIPES)} recipes]" in text


def test_chinese_readme_has_the_same_tables_and_commands():
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))
    assert parts(chinese) == parts(english), "README.zh.md has the tables and commands of README.md: change both"


PUBLISHED = [
    ROOT / "README.md",
    ROOT / "README.zh.md",
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "web" / "docs").glob("*.md"),
]


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.name)
def test_links_lead_to_what_is_published(path):
    """A relative link leads to a file of the archive, and to a heading that is there."""
    ignored = [line.strip("/") for line in (ROOT / ".comfyignore").read_text().splitlines() if line.startswith("/")]
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        name, _, heading = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        inside = target.resolve().relative_to(ROOT)
        assert inside.parts[0] not in ignored, f"{link} is not in the archive"
        headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE) if heading else []
        assert not heading or heading in {title.lower().replace(" ", "-") for title in headings}, link


def test_troubleshooting_quotes_the_messages_of_the_pack_as_they_are():
    page_has, sources = page("troubleshooting"), {name: (ROOT / name).read_text(encoding="utf-8") for name in QUOTED}
    for name, quoted in QUOTED.items():
        assert quoted in page_has and quoted in sources[name], f"{quoted!r} is not in {name} any more"


QUOTED = {"nodes/folders.py": " is not in ", "ops/loading/native_support.py": " does not load in this ComfyUI "}
"""A part of a message that docs/troubleshooting.md quotes, by the module that has it."""


def parts(text):
    """Return the parts that a translation keeps: commands, pictures, and figures in tables."""
    code = re.findall(r"^ *```.*?^ *```", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    tables = [
        [[cell if figure(cell) else "" for cell in row.split("|")] for row in table.splitlines()]
        for table in re.findall(r"(?:^\|.*\n)+", prose, re.MULTILINE)
    ]
    return code, tables, re.findall(r"!\[.*\]\((.+)\)", prose)


def figure(cell):
    return re.fullmatch(r"[\s\dA-Z_.x()-]*(MB|dB)?\s*", cell)
