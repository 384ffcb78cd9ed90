"""The GPU benchmark of memory runs on the CPU, with only those packages that its machine has."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from wanquant.bench import gpu_host, gpu_memory
from wanquant.testing.hosts import checkout

ROOT = Path(__file__).resolve().parent.parent
THERE = "torch torchgen functorch triton numpy"
OF_TORCH = "filelock fsspec jinja2 markupsafe mpmath networkx setuptools sympy typing_extensions"
BLOCKED = """
import runpy, sys
from importlib.metadata import packages_distributions
from pathlib import Path

carried, there, script = sys.argv[1:4]
absent = packages_distributions().keys() - there.split() - {path.stem for path in Path(carried).iterdir()}

class Block:
    def find_spec(name, path, target=None):
        if name in absent:
            raise ModuleNotFoundError(f"{name} is not on that machine", name=name)

sys.meta_path.insert(0, Block)
del sys.argv[:3]
runpy.run_path(script, run_name="__main__")
"""


def test_selftest_with_what_is_carried(tmp_path: Path) -> None:
    if not checkout().is_dir():
        pytest.skip(f"no ComfyUI at {checkout()}: run `python3 dev.py setup`, or set COMFYUI_PATH")
    carried, results, model = tmp_path / "carried", tmp_path / "results.jsonl", tmp_path / "model.gguf"
    assert gpu_host.assemble(carried, checkout()) < 64 << 20
    script = ROOT / "bench" / "gpu_memory.py"
    arguments = [carried, f"{THERE} {OF_TORCH}", script, results, "--selftest", "--patcher", "dynamic"]
    arguments += ["--carried", carried, "--model", model]
    command = [sys.executable, "-I", "-c", BLOCKED, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    machine, *rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert machine["torch"] == torch.__version__
    assert [(row["plan"], row["loras"]) for row in rows] == [("stock", 0), ("lean", 0), ("stock", 1), ("lean", 1)]
    for row in rows:
        assert 0 <= row["difference"] < (0.01 if row["precision"] == "exact" else 0.05)
        assert row["seconds_a_step"] > 0


def test_a_case_that_fails_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process measures a case and crashes in the next, one hangs in the third, the last measures the fourth."""
    options = argparse.Namespace(results=tmp_path / "results.jsonl", selftest=True, lean=False)
    seen, measures = [], iter([1, None, 1])

    def process(command: list[str], **_: object) -> SimpleNamespace:
        seen.append(int(command[command.index("--skip") + 1]))
        count = next(measures)
        if count is None:
            raise subprocess.TimeoutExpired(command, 1)
        with options.results.open("a") as file:
            file.write(
                json.dumps({"case": "machine"}) + "\n" + json.dumps({"case": "sample", "process": len(seen)}) + "\n"
            )
        return SimpleNamespace(returncode=1 if len(seen) == 1 else 0)

    monkeypatch.setattr(gpu_memory.subprocess, "run", process)
    assert gpu_memory.measure_all(options, "legacy", 1) == 2
    assert seen == [0, 2, 3]
    rows = [json.loads(line) for line in options.results.read_text().splitlines()]
    assert [row["case"] for row in rows] == ["machine", "sample", "failed", "failed", "machine", "sample"]
    failed = [
        gpu_memory.Case(*(row[name] for name in gpu_memory.Case._fields)) for row in rows if row["case"] == "failed"
    ]
    assert failed == gpu_memory.TINY[1:3]
    assert [row["exit"] for row in rows if row["case"] == "failed"] == [1, -1]


@pytest.mark.parametrize(("dynamic", "ratio"), [(False, 1.1), (True, 0.9)])
def test_measured_over_predicted(dynamic: bool, ratio: float) -> None:
    parts = {"weights": 0.1, "scratch": 0.2, "activations": 1.3, "fragmentation": 0.1, "context": 0.3}
    row = {"predicted_gib": parts, "resident_gib": 0.4, "torch_gib": 2.2, "device_gib": 2.16}
    assert gpu_memory.of_predicted(row, dynamic=dynamic) == ratio
    assert gpu_memory.of_predicted(row | {"kept_rows_gib": 0.8}, dynamic=dynamic) < ratio
    assert gpu_memory.of_predicted({"predicted_gib": parts, "resident_gib": 0.4}, dynamic=dynamic) is None
