"""The benchmark of dequantization counts correctly and runs."""

from __future__ import annotations

import json
import sys

import torch

from wanquant.bench import dequant
from wanquant.quant import QTYPES


def test_traffic_counts_kernels_and_bytes() -> None:
    packed = torch.zeros(4, 34, dtype=torch.uint8)
    assert dequant.traffic(lambda: QTYPES["Q8_0"].dequantize(packed, torch.float16)) == {"kernels": 1, "bytes": 3.06}
    a = torch.ones(8, 8)
    assert dequant.traffic(lambda: a.view(4, 16).t()[2:].mul_(2) + 1) == {"kernels": 2, "bytes": 16.0}


def test_runs_and_prints_json(monkeypatch, capsys) -> None:
    arguments = ["--json", "--types", "Q4_K", "IQ2_S", "--size", "256", "--seconds", "0"]
    monkeypatch.setattr(sys, "argv", ["dequant", *arguments])
    threads = torch.get_num_threads()
    dequant.main()
    torch.set_num_threads(threads)
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["type"] for row in rows] == ["Q4_K", "IQ2_S"]
    assert rows[0]["ours"] == {"kernels": 1, "bytes": 2.56}
    assert all(row["ms"] > 0 for row in rows)
