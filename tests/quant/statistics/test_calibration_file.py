"""Files of calibrations: a round trip, and the files that are refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from wanquant.quant import QuantError, read_calibration, write_calibration
from wanquant.quant.statistics.calibration import CalibrationCollector
from wanquant.quant.statistics.calibration_file import _KEY


@pytest.fixture
def calibration():
    collector = CalibrationCollector()
    inputs = torch.randn(9, 512)
    for name in ("b.q.weight", "b.k.weight", "b.v.weight"):
        collector.add(name, inputs)
    collector.add("b.o.weight", torch.randn(9, 96))
    collector.samples = 4
    return collector.result()


def test_round_trip(tmp_path, calibration):
    path = write_calibration(tmp_path / "c.safetensors", calibration)
    read = read_calibration(path)
    assert (read.samples, read.name, dict(read.counts)) == (4, "c.safetensors", dict(calibration.counts))
    assert set(read) == set(read.products) == set(calibration)
    for name in calibration:
        assert torch.equal(read[name], calibration[name])
        assert torch.equal(read.moments(name), calibration.moments(name))


def test_inputs_that_several_layers_share_are_written_once(tmp_path, calibration):
    path = write_calibration(tmp_path / "c.safetensors", calibration)
    assert {name: tensor.shape for name, tensor in load_file(path).items()} == {
        "b.k.weight": (2, 256, 256),
        "b.o.weight": (3, 32, 32),
    }


def write(path, products, **described):
    save_file({"w": products}, path, {_KEY: json.dumps({"samples": 1, "counts": {"w": 2}, "same": {}} | described)})


@pytest.mark.parametrize(
    ("products", "described", "problem"),
    [
        (torch.eye(32)[None], {"counts": {"w": 0}}, "tensor w: its count is 0"),
        (torch.full((1, 32, 32), torch.nan), {}, "tensor w: holds NaN"),
        (-torch.eye(32)[None], {}, "tensor w: holds NaN, infinity or a negative square"),
        (torch.eye(32), {}, r"tensor w: products are F32 \(32, 32\), expected F32 \(n, span, span\)"),
        (torch.ones(2, 16, 16), {}, r"tensor w: products are F32 \(2, 16, 16\)"),
        (torch.eye(32)[None].half(), {}, r"tensor w: products are F16"),
        (torch.eye(32)[None], {"counts": {"v": 1}}, "tensor v: products are none"),
        (torch.eye(32)[None], {"counts": 3}, "not a calibration"),
    ],
    ids=["zero count", "nan", "negative", "flat", "narrow", "dtype", "absent", "layout"],
)
def test_malformed_tensors_are_refused_with_their_name(tmp_path, products, described, problem):
    path = tmp_path / "c.safetensors"
    write(path, products, **described)
    with pytest.raises(QuantError, match=problem):
        read_calibration(path)


def test_other_files_are_refused(tmp_path, calibration):
    model, cut = tmp_path / "model.safetensors", tmp_path / "cut.safetensors"
    save_file({"w": torch.zeros(2)}, model)
    with pytest.raises(QuantError, match="not a calibration"):
        read_calibration(model)
    whole = write_calibration(tmp_path / "c.safetensors", calibration).read_bytes()
    cut.write_bytes(whole[:-100])
    with pytest.raises(QuantError, match="the file is cut"):
        read_calibration(cut)
    with pytest.raises(QuantError, match="cannot be read"):
        read_calibration(tmp_path / "missing.safetensors")
