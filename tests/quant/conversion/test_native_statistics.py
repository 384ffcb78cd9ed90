"""Conversion to ComfyUI's own formats with statistics of the inputs: rounding for the outputs of layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from wanquant.quant.conversion.convert import convert
from wanquant.quant.gguf.provenance import encoder_revisions
from wanquant.quant.inspection.verify import verify
from wanquant.quant.native import levels, native_format, nvfp4, rowwise
from wanquant.quant.native.registry import NATIVE
from wanquant.quant.sources.checkpoint import open_checkpoint
from wanquant.quant.statistics.importance import Importance
from wanquant.testing.tiny_wan import write_tiny_wan
from wanquant.tests.quant.samples import collected, correlated

LAYER = "blocks.0.ffn.0"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Return the path of a Wan of one layer, whose largest weights are two slices of the rounding."""
    return write_tiny_wan(tmp_path_factory.mktemp("small") / "wan.safetensors", layers=1, ffn_dim=256)


def calibrated(small):
    """Return a calibration of two layers, whose inputs have a mean."""
    widths = {name: tensor.shape[1] for name, tensor in load_file(small).items() if tensor.ndim == 2}
    known = collected(**{n: correlated(k) + 0.5 for n, k in widths.items() if ".ffn." in n})
    return replace(known, name="a.safetensors")


@pytest.mark.parametrize("name", ["W4A8", "NVFP4"])
def test_a_calibration_rounds_for_the_outputs(name, small, tmp_path, monkeypatch):
    known = calibrated(small)
    plain = convert(small, tmp_path / "plain.safetensors", name)
    report = convert(small, tmp_path / "a.safetensors", name, importance=known)
    assert "2 matrices were rounded for the least error of the layers' outputs" in report.text()
    assert report.metadata["wanquant.calibrated"] is True
    revisions = encoder_revisions(report.metadata)
    assert revisions[f"{name} (ComfyUI)" if name == "NVFP4" else name] == NATIVE[name].revision + 1
    assert "rounded for the outputs of their layers" in verify(report.path, small).text()
    assert "rounded for the outputs" not in verify(plain.path, small).text()
    errors = []
    for path in (plain.path, report.path):
        with open_checkpoint(path) as checkpoint, open_checkpoint(small) as source:
            weight, bias = f"{LAYER}.weight", f"{LAYER}.bias"
            inputs = correlated(256, seed=1) + 0.5
            outputs = [
                inputs @ each[weight].read().float().view(256, 256).t() + each[bias].read().float()
                for each in (checkpoint.tensors, source.tensors)
            ]
            errors.append(float((outputs[0] - outputs[1]).norm()))
    assert errors[1] < 0.7 * errors[0]
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    monkeypatch.setattr(native_format, "ROUNDED_ELEMENTS", 1 << 15)
    for module in (rowwise, levels, nvfp4):
        monkeypatch.setattr(module, "ROUNDED_ELEMENTS", 1 << 15)
    again = convert(small, tmp_path / "b.safetensors", name, importance=known)
    torch.set_num_threads(threads)
    assert again.path.read_bytes() == report.path.read_bytes()


def test_importance_rounds_formats_that_rotate(small, tmp_path):
    known = calibrated(small)
    importance = Importance(known.sums, known.counts, known.samples, totals=known.totals)
    for name in ("INT4", "NVFP4"):
        report = convert(small, tmp_path / f"{name}.safetensors", name, importance=importance)
        assert ("2 matrices were rounded" in report.text()) == NATIVE[name].rotates
        assert "wanquant.calibrated" not in report.metadata
        assert (name in encoder_revisions(report.metadata)) == NATIVE[name].rotates
    fast = convert(small, tmp_path / "fast.safetensors", "INT4", importance=importance, effort="fast")
    plain = convert(small, tmp_path / "plain.safetensors", "INT4", effort="fast")
    assert torch.equal(*(load_file(each.path)[f"{LAYER}.weight"] for each in (fast, plain)))
