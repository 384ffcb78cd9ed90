"""The part of the check of the installation that runs in ComfyUI."""

from __future__ import annotations

import pytest
import torch

from wanquant.ops import check
from wanquant.ops.check import check_in_host
from wanquant.quant import QuantError
from wanquant.quant.check.parts import SOURCE, file_parts
from wanquant.quant.check.report import run_parts
from wanquant.quant.check.tiny_wan import write_random_wan


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("check")
    assert all(step.ok for step in run_parts(file_parts(folder, torch.device("cpu"))))
    return folder


def test_server_names_its_memory_mode(folder, monkeypatch):
    calls = []
    report = check_in_host(folder, server=True, done=lambda: calls.append(1))
    assert report.ok and not report.not_checked, report.text()
    assert [step.name for step in report.steps] == ["load", "sample", "memory", "8-bit products"]
    assert len(calls) == 4
    load, sample, memory, _ = (step.text for step in report.steps)
    assert "holds 20 layers packed, for cpu" in load
    assert "ComfyUI's own layers" in sample and "from the source with Q4_K_M" in sample
    assert "older memory manager" in memory
    monkeypatch.setattr(check.host, "dynamic_vram", lambda: True)
    assert "dynamic VRAM streams" in check._memory().text


def test_incompatible_host_fails_in_a_sentence(folder, monkeypatch):
    def refuses(*_: object) -> None:
        raise QuantError("this ComfyUI is not compatible; update WanQuant")

    monkeypatch.setattr(check, "load_diffusion_model", refuses)
    report = check_in_host(folder, server=True)
    assert [(step.name, step.ok) for step in report.steps] == [("load", False), ("8-bit products", True)]
    assert report.steps[0].text == "this ComfyUI is not compatible; update WanQuant"
    assert report.not_checked == ["sample, memory: not run after a failure; solve it first"]


def test_layers_that_compute_something_else_fail(folder, monkeypatch, tmp_path):
    load_native_model = check.load_native_model
    other = write_random_wan(tmp_path / SOURCE, seed=1)
    monkeypatch.setattr(check, "load_native_model", lambda _, dtype=None: load_native_model(other, dtype=dtype))
    report = check_in_host(folder, server=False)
    _, sample, _ = report.steps
    assert not sample.ok and "expected at least 30; update ComfyUI and WanQuant" in sample.text
