"""Files of calibrations: a round trip, and the files that are refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from wanquant.quant import QuantError, read_calibration, write_calibration
from wanquant.quant.sources.files import HashedFile
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
    assert read.sha256 == calibration.sha256
    for name in calibration:
        assert torch.equal(read[name], calibration[name])
        for part in ("products", "totals", "factors", "held_out"):
            assert torch.equal(getattr(read, part)[name], getattr(calibration, part)[name])


def test_inputs_of_equal_squares_are_told_apart(tmp_path):
    """Signs alone differ, so that the mean squares are equal and the products are not."""
    collector = CalibrationCollector()
    signs = torch.randint(2, (9, 512)) * 2.0 - 1
    collector.add("b.q.weight", signs)
    collector.add("b.k.weight", signs * torch.tensor([1.0, -1.0]).repeat(256))
    calibration = collector.result()
    read = read_calibration(write_calibration(tmp_path / "c.safetensors", calibration))
    assert torch.equal(read["b.q.weight"], read["b.k.weight"])
    for name in calibration:
        assert torch.equal(read.products[name], calibration.products[name])
    assert not torch.equal(read.products["b.q.weight"], read.products["b.k.weight"])


def test_asking_for_a_name_reads_nothing(tmp_path, calibration, monkeypatch):
    """A conversion asks on the thread that reads the source."""
    read = read_calibration(write_calibration(tmp_path / "c.safetensors", calibration))
    monkeypatch.setattr(HashedFile, "peek", None)
    assert "b.o.weight" in read.held_out and "b.o.weight" in read.products and "other" not in read.factors


def test_inputs_that_several_layers_share_are_written_once(tmp_path, calibration):
    path = write_calibration(tmp_path / "c.safetensors", calibration)
    assert {name: tensor.shape for name, tensor in load_file(path).items()} == {
        "b.k.weight": (2, 256, 256),
        "b.k.weight.totals": (512,),
        "b.k.weight.factors": (512, 64),
        "b.k.weight.held_out": (len(calibration.held_out["b.k.weight"]), 512),
        "b.o.weight": (3, 32, 32),
        "b.o.weight.totals": (96,),
        "b.o.weight.factors": (96, 64),
        "b.o.weight.held_out": (len(calibration.held_out["b.o.weight"]), 96),
    }


def write(path, products, parts=None, **described):
    tensors = {"w": products, **{f"w.{part}": values for part, values in (parts or {}).items()}}
    save_file(tensors, path, {_KEY: json.dumps({"samples": 1, "counts": {"w": 2}, "same": {}} | described)})


def test_files_of_version_0_1_0_have_only_products(tmp_path):
    path = tmp_path / "c.safetensors"
    write(path, torch.eye(64)[None])
    read = read_calibration(path)
    assert read.mean("w") is None
    assert not read.factors and not read.held_out
    second = read.moments("w")
    assert torch.equal(second.blocks, torch.eye(64)[None].double() / 2)
    assert second.factors.shape == (1, 64, 0)


@pytest.mark.parametrize(
    ("part", "values", "problem"),
    [
        ("totals", torch.ones(32).half(), r"totals are F16 \(32,\), expected F32 \(64,\)"),
        ("totals", torch.full((64,), 3.0), "its sums of inputs do not fit the sums of their squares"),
        ("totals", torch.full((64,), torch.nan), "its sums of inputs do not fit"),
        ("factors", torch.ones(32, 64), r"factors are F32 \(32, 64\), expected F32 \(64, 64\)"),
        ("factors", torch.ones(64, 65), r"factors are F32 \(64, 65\), expected F32 \(64, 64\)"),
        ("factors", torch.ones(()), r"factors are F32 \(\)"),
        ("factors", torch.full((64, 2), torch.inf), "factors hold NaN or infinity"),
        ("held_out", torch.ones(2, 64), r"held_out are F32 \(2, 64\), expected BF16 \(2, 64\)"),
        ("held_out", torch.ones(65, 64).bfloat16(), r"held_out are BF16 \(65, 64\), expected BF16 \(64, 64\)"),
        ("held_out", torch.full((2, 64), torch.nan).bfloat16(), "held_out hold NaN or infinity"),
    ],
)
def test_malformed_parts_are_refused_with_their_name(tmp_path, part, values, problem):
    path = tmp_path / "c.safetensors"
    write(path, torch.eye(64)[None], {part: values})
    with pytest.raises(QuantError, match=f"tensor w: {problem}"):
        read_calibration(path)


@pytest.mark.parametrize(
    ("products", "described", "problem"),
    [
        (torch.eye(32)[None], {"counts": {"w": 0}}, "tensor w: its count is 0"),
        (torch.full((1, 32, 32), torch.nan), {}, "tensor w: holds NaN"),
        (-torch.eye(32)[None], {}, "tensor w: holds NaN, infinity or a negative square"),
        (torch.ones(1, 32, 32).triu(), {}, "tensor w: is not symmetric"),
        (torch.eye(32), {}, r"tensor w: products are F32 \(32, 32\), expected F32 \(n, span, span\)"),
        (torch.ones(2, 16, 16), {}, r"tensor w: products are F32 \(2, 16, 16\)"),
        (torch.ones(1, 0, 0), {}, r"tensor w: products are F32 \(1, 0, 0\)"),
        (torch.eye(32)[None].half(), {}, r"tensor w: products are F16"),
        (torch.eye(32)[None], {"counts": {"v": 1}}, "tensor v: products are none"),
        (torch.eye(32)[None], {"counts": 3}, "not a calibration"),
    ],
    ids=["zero count", "nan", "negative", "asymmetric", "flat", "narrow", "empty", "dtype", "absent", "layout"],
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
