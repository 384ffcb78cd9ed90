"""The GPU benchmark's correctness check passes in Triton's interpreter, and the script reports a missing GPU."""

from __future__ import annotations

import ast
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
    """One type of each kind: test_triton.py has all of them."""
    result = run(str(tmp_path / "results.jsonl"), "--selftest", "--types", "Q4_K", "IQ2_XS", "NVFP4", interpret="1")
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert (rows[0]["case"], rows[0]["torch"], rows[0]["left_out"]) == ("machine", torch.__version__, [])
    assert len(rows) == 1 + 3 * 4
    assert all(row["same_bits"] for row in rows[1:])


STUB = """
import runpy, sys, types
import torch, triton
from torch.overrides import TorchFunctionMode

class StubCUDA(TorchFunctionMode):
    \"\"\"The device "cuda" is main memory.\"\"\"

    def __torch_function__(self, function, types, args=(), kwargs=None):
        args = tuple("cpu" if arg == "cuda" else arg for arg in args)
        kwargs = {key: "cpu" if value == "cuda" else value for key, value in (kwargs or {}).items()}
        return function(*args, **kwargs)

torch.cuda.reset_peak_memory_stats = lambda: None
torch.cuda.memory_allocated = lambda: 5 << 20
torch.cuda.max_memory_allocated = lambda: 7 << 20
triton.testing.do_bench = lambda call, **options: (call(), 2.5)[1]
bench = runpy.run_path(sys.argv[1])
bench["layer"].__globals__.update(LAYER=(64, 512), TILE_BYTES=24 * 1024)
with StubCUDA():
    print(bench["speed"](bench["QTYPES"]["Q4_K"], (16, 512), 1000.0))
    print(bench["int8_speed"](bench["QTYPES"]["Q4_K"], (16, 512), 1000.0))
    print(bench["layer"](bench["QTYPES"]["Q8_0"], 3))
sys.modules["gguf"] = None
print([qtype.name for qtype in bench["types_here"]()])
"""


def test_measurements_on_a_stub_of_cuda() -> None:
    """The measurements run, and a Linear in tiles equals the whole one; the times are the stub's.

    Without gguf, the types are those without a grid.
    """
    command = [sys.executable, "-I", "-c", STUB, str(ROOT / "bench" / "gpu_dequant.py")]
    result = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    speed, int8, layer, without_gguf = (ast.literal_eval(line) for line in result.stdout.splitlines())
    assert (speed["us"], speed["gb_s"], speed["of_copy"]) == (2500.0, 0, 0.0)
    assert {int8[name] for name in ("us", "two_step_us", "torch_us")} == {2500.0}
    assert {layer[name] for name in ("us", "whole_us", "bf16_us", "bf16_again_us")} == {2500.0}
    assert layer["error"] < 5e-3
    assert layer["peak_mib"] == 2.0
    assert len(without_gguf) == 18
    assert not [name for name in without_gguf if name.startswith(("IQ1", "IQ2", "IQ3"))]


def test_without_a_gpu_it_says_so() -> None:
    result = run()
    assert (result.returncode, result.stdout) == (0, "no CUDA device: try TRITON_INTERPRET=1 and --selftest\n")
