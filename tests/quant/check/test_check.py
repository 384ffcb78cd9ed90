"""The check of the installation, without ComfyUI and with it in another process."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from wanquant.quant import host_process, torch_op
from wanquant.quant.__main__ import main
from wanquant.quant.check import parts
from wanquant.quant.check.report import CheckReport, Finding, run_parts
from wanquant.quant.check.run import check_installation
from wanquant.quant.check.tiny_wan import SIZE, write_random_wan
from wanquant.quant.errors import QuantError
from wanquant.quant.files.safetensors_header import read_safetensors_header
from wanquant.quant.kernels.optional import OptionalPath
from wanquant.quant.plan.wan_shapes import transformer_shapes
from wanquant.quant.qtype import QuantType
from wanquant.testing.hosts import ROOT, checkout

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WITHOUT_HOST = ["system", "convert", "compare", "dequantize", "8-bit products"]


@pytest.fixture(autouse=True)
def no_comfyui(monkeypatch, tmp_path):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(parts, "accelerator", lambda: CPU)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    yield
    assert not list((tmp_path / "temporary").glob("wanquant*")), "nothing is left behind"


def names(report):
    return [step.name for step in report.steps]


def test_a_seed_always_gives_the_same_file(tmp_path):
    first, second, other = (write_random_wan(tmp_path / f"{i}", seed) for i, seed in enumerate((0, 0, 1)))
    assert first.read_bytes() == second.read_bytes() != other.read_bytes()
    shapes = {entry.name: tuple(entry.shape) for entry in read_safetensors_header(first)[1]}
    assert shapes == transformer_shapes(SIZE)


def test_without_comfyui_the_rest_is_checked(capsys):
    assert main(["check"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "WanQuant: 5 checks passed"
    assert [line[3:].partition(":")[0] for line in lines if line.startswith("ok ")] == WITHOUT_HOST
    assert any("loading, sampling and the memory mode" in line and "set COMFYUI_PATH" in line for line in lines)
    (ran,) = [line for line in lines if "dequantize" in line]
    assert "on cpu by libggml (Q4_K, Q6_K); the bits are equal" in ran
    assert main(["check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


@pytest.mark.parametrize("error", [OSError("no space"), QuantError("a sentence; do this")])
def test_a_failure_is_a_sentence_and_an_exit_code(monkeypatch, capsys, error):
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(parts, "convert_all", fails)
    assert main(["check"]) == 1
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "WanQuant: 1 of 3 checks failed"
    expected = "a sentence; do this" if isinstance(error, QuantError) else "OSError: no space; update WanQuant, and if"
    assert any(line.startswith(f"FAILED convert: {expected}") for line in lines)
    assert "not checked: compare, dequantize: not run after a failure; solve it first" in lines


def test_a_file_of_other_weights_fails(monkeypatch):
    convert_all = parts.convert_all

    def of_another(source: Path, *arguments: object) -> None:
        convert_all(write_random_wan(source.with_name("other.safetensors"), 1), *arguments)

    monkeypatch.setattr(parts, "convert_all", of_another)
    (*_, compare, products) = check_installation().steps
    assert (compare.name, compare.ok, products.ok) == ("compare", False, True)
    assert "Q4_K_M.gguf: -" in compare.text and "expected at least 15; the conversion computes wrongly" in compare.text


def test_other_bits_fail(monkeypatch):
    dequantize = parts.eager.dequantize

    def other_bits(qtype: QuantType, packed: torch.Tensor, out: torch.Tensor) -> None:
        dequantize(qtype, packed, out)
        if qtype.name == "Q4_K":
            out.view(-1)[0] += 1

    monkeypatch.setattr(parts.eager, "dequantize", other_bits)
    failed = [step.text for step in check_installation().steps if not step.ok]
    assert failed == ["Q4_K on cpu: other values than by torch operations; update WanQuant"]


def test_without_libggml_torch_runs_and_the_text_says_how_to_get_it(monkeypatch):
    absent = OptionalPath("absent", "ggml's C code", "libggml")
    monkeypatch.setattr(parts, "GGML", absent)
    monkeypatch.setitem(torch_op._PATHS, "cpu", absent)
    text = check_installation().text()
    assert "on cpu by torch (Q4_K, Q6_K)" in text
    assert "faster: ggml's C code cannot be used (No module named" in text and "pip install 'libggml-python" in text


def test_what_is_missing_on_a_gpu(monkeypatch):
    fused = OptionalPath("triton_kernel", "Fused Triton dequantization", "Triton")
    monkeypatch.setattr(parts, "FUSED", fused)
    assert not any("Triton" in text for text in parts._faster(CUDA))
    fused.missing = "No module named 'triton'"
    assert any("No module named 'triton'" in text and "triton-windows" in text for text in parts._faster(CUDA))
    assert not any("Triton" in text for text in parts._faster(CPU)), "the CPU has no use for it"
    fused.lost.add("Q4_K")
    assert any("Fused Triton dequantization failed for Q4_K" in text for text in parts._faster(CUDA))
    backends = {"triton": {"disabled": True}, "hip": {"unavailable_reason": "no ROCm"}, "eager": {"disabled": False}}
    (text,) = parts._faster_products(backends, "eager", CUDA)
    assert "run on PyTorch operations (hip: no ROCm; triton: turned off); install" in text
    assert parts._faster_products(backends, "cuda", CUDA) == parts._faster_products(backends, "eager", CPU) == ()


def test_gpu_that_pytorch_does_not_use(monkeypatch):
    monkeypatch.setattr(parts.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "does not use the NVIDIA GPU of this machine; install its build" in parts._system(CPU).faster[0]


def products():
    (step,) = run_parts(parts.product_parts(CPU))
    return step


def test_products_of_other_versions_of_comfy_kitchen(monkeypatch):
    kitchen = pytest.importorskip("comfy_kitchen")
    if not hasattr(kitchen, "int8_linear"):
        assert "none in comfy-kitchen" in products().text and "update ComfyUI to 0.27" in products().faster[0]
        return
    assert products().ok and "backend eager" in products().text
    with monkeypatch.context() as context:
        context.setattr(kitchen, "int8_linear", lambda **arguments: torch.zeros(64, 128))
        assert not products().ok and "a relative error of 1.000, expected at most 0.05" in products().text
    with monkeypatch.context() as context:
        context.delattr(kitchen, "int8_linear")
        assert "none in comfy-kitchen" in products().text
    monkeypatch.setitem(sys.modules, "comfy_kitchen", None)
    assert products().ok and "not installed" in products().text and "update ComfyUI" in products().faster[0]


def test_report_says_when_nothing_is_missing():
    report = CheckReport(list(run_parts([("a", lambda: Finding("fine"))])))
    assert report.text() == "WanQuant: 1 check passed\nnothing is missing for more speed\nok a: fine"
    assert CheckReport.from_json(json.loads(json.dumps(report.json()))) == report


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("absent", r"absent: has no folder comfy; set it to the folder with ComfyUI's main\.py"),
        ("broken", r"broken does not run in .*python.* \(ModuleNotFoundError: .*comfy\.cli_args.*\); use the Python"),
    ],
)
def test_comfyui_that_is_none(tmp_path, monkeypatch, folder, message):
    (tmp_path / "broken" / "comfy").mkdir(parents=True)
    (tmp_path / "broken" / "comfy" / "__init__.py").touch()
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / folder))
    report = check_installation()
    (failed,) = [step for step in report.steps if not step.ok]
    assert failed.name == "ComfyUI"
    assert re.search(message, failed.text)
    assert names(report)[-1] == "8-bit products"


def test_comfyui_around_the_pack_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(host_process, "PACK", tmp_path / "custom_nodes" / "pack")
    assert host_process.find_comfyui() is None
    (tmp_path / "comfy").mkdir()
    assert host_process.find_comfyui() == tmp_path


def test_with_comfyui_everything_is_checked(tmp_path, monkeypatch):
    if not checkout().is_dir():
        pytest.skip(f"no ComfyUI at {checkout()}: run `python3 dev.py setup`")
    site = f"import runpy\nrunpy.run_path({str(ROOT / 'testing' / 'host_shims.py')!r})['install']()\n"
    (tmp_path / "sitecustomize.py").write_text(site)
    monkeypatch.setenv("PYTHONPATH", os.fspath(tmp_path))
    monkeypatch.setenv("COMFYUI_PATH", str(checkout()))
    report = check_installation()
    assert report.ok, report.text()
    assert names(report) == [*WITHOUT_HOST[:-1], "load", "sample", WITHOUT_HOST[-1]]
    (text,) = report.not_checked
    assert "the memory mode" in text and "run the node Check Installation" in text
