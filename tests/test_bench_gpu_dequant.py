"""The GPU benchmark's own correctness check, in Triton's interpreter, and what it says without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("triton", reason="Triton's wheels are for Linux")


def run(*arguments: str, interpret: str = "0") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", str(ROOT / "bench" / "gpu_dequant.py"), *arguments]
    environment = os.environ | {"TRITON_INTERPRET": interpret, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_selftest(tmp_path: Path) -> None:
    result = run(str(tmp_path / "results.jsonl"), "--selftest", interpret="1")
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert (rows[0]["case"], rows[0]["torch"]) == ("machine", torch.__version__)
    assert len(rows) == 1 + 12 * 3
    assert all(row["same_bits"] for row in rows[1:])


def test_without_a_gpu_it_says_so() -> None:
    result = run()
    assert (result.returncode, result.stdout) == (0, "no CUDA device: try TRITON_INTERPRET=1 and --selftest\n")
