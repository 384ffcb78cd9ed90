"""The GPU benchmark of memory with tiny shapes on the CPU, where nothing can be imported but what its machine has."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from wanquant.bench import gpu_host
from wanquant.dev import checkout

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
        assert 0 <= row["difference"] < 0.01
        assert row["seconds_a_step"] > 0
