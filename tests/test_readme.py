"""The README's tables equal the output of their commands, and the Chinese README has the same content."""

from __future__ import annotations

import json
import re

import pytest
import torch

from wanquant.bench import dequant, sizes, tables
from wanquant.quant import QTYPES
from wanquant.testing.hosts import ROOT


def test_size_table_is_current(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["sizes"])
    sizes.main()
    assert capsys.readouterr().out in (ROOT / "README.md").read_text()


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
    assert f"{min(of_grids.values()):.2f} to {max(of_grids.values()):.2f} bytes" in (ROOT / "README.md").read_text()
    in_table = [row for row in fused if "peer" in row]
    assert len(in_table) == 12
    for row in in_table:
        ours, peer = row["ours"], row["peer"]
        counts = f"{ours['kernels']} | {ours['bytes']:.2f} | {peer['kernels']} | {peer['bytes']:.2f}"
        line = f"| {row['type']} | {counts} | {row['of_peer']}x ({row['torch_of_peer']}x) |"
        assert line in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", tables.READMES, ids=lambda path: path.name)
def test_tables_are_those_of_the_results(path):
    text = path.read_text(encoding="utf-8")
    assert tables.updated(text) == text, "run python3 dev.py bench tables"
    stale = re.sub(r"^\| Q6_K \| 0 \|.*\n", "", text, flags=re.MULTILINE)
    assert stale != text and tables.updated(stale) == text


def test_chinese_readme_has_the_same_parts_and_figures():
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))
    assert parts(chinese) == parts(english), "README.zh.md follows README.md: change both"


def parts(text):
    """Return the parts that a translation keeps: levels of headings, commands, pictures, and figures in tables."""
    code = re.findall(r"^```.*?^```", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    tables = [
        [[cell if figure(cell) else "" for cell in row.split("|")] for row in table.splitlines()]
        for table in re.findall(r"(?:^\|.*\n)+", prose, re.MULTILINE)
    ]
    headings = [line.split()[0] for line in prose.splitlines() if line.startswith("#")]
    return headings, code, tables, re.findall(r"!\[.*\]\((.+)\)", prose), len(re.findall("^- ", prose, re.MULTILINE))


def figure(cell):
    return re.fullmatch(r"[\s\dA-Z_.x()-]*(MB|dB)?\s*", cell)
