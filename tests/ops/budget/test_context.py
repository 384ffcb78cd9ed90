"""The memory of CUDA's context, against what an H100 was measured to need. A mock stands for that GPU."""

import json
from types import SimpleNamespace

import pytest
import torch

from wanquant.ops.budget.context import context_bytes, unseen_bytes
from wanquant.quant.units import GIB
from wanquant.testing.hosts import ROOT


def test_a_gpu_of_more_threads_takes_more(monkeypatch):
    h100 = SimpleNamespace(multi_processor_count=132, max_threads_per_multi_processor=2048)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: h100)
    rows = json.loads((ROOT / "bench" / "results" / "gpu-memory-h100.json").read_text())["rows"]
    outside = [row["device_gib"] - row["reserved_gib"] for row in rows if not row["is_dynamic"]]
    assert len(outside) >= 4
    assert context_bytes(torch.device("cuda", 0)) / GIB == pytest.approx(sum(outside) / len(outside), abs=0.02)
    assert context_bytes(torch.device("meta")) < context_bytes(torch.device("cuda", 0))


def test_other_devices_count_as_a_small_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)  # ROCm's device type is cuda too
    for count in (context_bytes, unseen_bytes):
        assert {count(torch.device(name)) for name in ("cuda", "mps", "xpu")} == {count(torch.device("meta"))}


def test_hopper_has_larger_workspaces(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, expected in (((9, 0), 248), ((8, 9), 152)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert unseen_bytes(torch.device("cuda", 0)) == expected << 20
