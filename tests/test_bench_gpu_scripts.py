"""The GPU scripts for encoders, products and the whole pack run on the CPU, with tiny shapes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from wanquant.bench import gpu_host
from wanquant.testing.hosts import ROOT, checkout


def rows(script: str, results: Path, *arguments: str) -> list[dict[str, object]]:
    command = [sys.executable, "-I", str(ROOT / "bench" / script), str(results), "--selftest", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    machine, *found = [json.loads(line) for line in results.read_text().splitlines()]
    assert machine["case"] == "machine"
    return found


def test_encoders_of_one_device_agree(tmp_path: Path) -> None:
    found = rows(
        "gpu_encode.py", tmp_path / "results.jsonl", "--types", "Q4_K", "IQ4_XS", "--ways", "plain", "calibrated"
    )
    assert [(row["type"], row["way"]) for row in found] == [
        ("Q4_K", "plain"),
        ("IQ4_XS", "plain"),
        ("Q4_K", "calibrated"),
        ("IQ4_XS", "calibrated"),
    ]
    assert all(row["differing"] == row["error"] == 0 for row in found)


def test_products_are_close_to_the_dense_one(tmp_path: Path) -> None:
    if not checkout().is_dir():
        pytest.skip(f"no ComfyUI at {checkout()}: run `python3 dev.py setup`, or set COMFYUI_PATH")
    carried = tmp_path / "carried"
    gpu_host.assemble(carried, checkout())
    backends, *found = rows("gpu_linear.py", tmp_path / "results.jsonl", "--carried", str(carried))
    assert backends["available"]["eager"]
    assert len(found) == 4
    for row in found:
        assert 0 < row["exact_error"] < 0.004
        assert 0 < row["int8_error"] < 0.03


def test_all_that_runs_on_a_gpu_runs_here(tmp_path: Path) -> None:
    if not checkout().is_dir():
        pytest.skip(f"no ComfyUI at {checkout()}: run `python3 dev.py setup`, or set COMFYUI_PATH")
    carried = tmp_path / "carried"
    gpu_host.assemble(carried, checkout())
    arguments = ["--carried", str(carried), "--patcher", "legacy"]
    found = {row["case"]: row for row in rows("gpu_check.py", tmp_path / "results.jsonl", *arguments)}
    assert len(found) == 8
    for name in ("convert Q4_K_M", "convert INT8"):
        assert found[name]["gpu_error"] == found[name]["cpu_error"]
        assert 0 < found[name]["difference"] < 0.1
    assert 0 < found["sample two LoRAs"]["difference"] < 0.1
    assert 0 < found["calibrate"]["best"]["difference"] < 0.1
    assert 0 < found["tune"]["difference"] < 0.1


def test_formats_and_precisions_are_timed(tmp_path: Path) -> None:
    if not checkout().is_dir():
        pytest.skip(f"no ComfyUI at {checkout()}: run `python3 dev.py setup`, or set COMFYUI_PATH")
    carried, folder = tmp_path / "carried", tmp_path / "models"
    gpu_host.assemble(carried, checkout())
    arguments = ["--carried", str(carried), "--folder", str(folder), "--recipes", "BF16", "Q4_K_M", "FP8"]
    found = rows("gpu_step.py", tmp_path / "results.jsonl", *arguments)
    assert {row["recipe"] for row in found} == {"BF16", "Q4_K_M", "FP8"}
    assert found[0]["of_bf16"] == 1 and found[0]["difference"] == 0
    for row in found:
        assert (row["plan"] == "lean") == (row["budget_gib"] == 0)
        assert 0 <= row["difference"] < 0.05
