"""Verification: measured errors against plain arithmetic on whole tensors."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from wanquant.quant import QTYPES, QuantError
from wanquant.quant.conversion.convert import convert
from wanquant.quant.gguf.layout import TensorSpec
from wanquant.quant.gguf.reader import open_gguf
from wanquant.quant.gguf.writer import GGUFWriter
from wanquant.quant.inspection import verify as verify_module
from wanquant.quant.inspection.report import inspect
from wanquant.quant.inspection.verify import verify
from wanquant.testing.tiny_wan import write_tiny_wan
from wanquant.tests.quant.renamed_gguf import renamed_gguf


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    source = write_tiny_wan(folder / "wan.safetensors", layers=2, ffn_dim=512)
    return convert(source, folder / "wan.gguf", "Q4_0", effort="fast").destination, source


def test_errors_of_tensors_and_roles_are_exact(files, monkeypatch):
    monkeypatch.setattr(verify_module, "_SLICE_ELEMENTS", 5000)
    gguf, source = files
    weights, packed, errors = load_file(source), open_gguf(gguf).tensors, {}
    verification = verify(gguf, source)
    for row in verification.tensors:
        weight = weights[row.name].double()
        errors[row.name] = (packed[row.name].dequantize().double() - weight).square().sum().item()
        assert row.relative_error == pytest.approx(math.sqrt(errors[row.name]) / weight.norm().item(), rel=1e-4)
    assert errors.keys() == weights.keys()
    ffn = next(row for row in verification.by_role if row.name == "ffn")
    assert ffn.noise == pytest.approx(
        sum(errors[name] for name in errors if ".ffn." in name and "weight" in name), rel=1e-4
    )
    assert verification.by_role[-1].noise == pytest.approx(sum(errors.values()), rel=1e-4)
    assert 18 < ffn.sqnr_db < 22


def test_errors_agree_with_those_that_the_file_records(files):
    gguf, source = files
    recorded = dict(zip(open_gguf(gguf).tensors, open_gguf(gguf).metadata["wanquant.relative_error"], strict=True))
    for row in verify(gguf, source).tensors:
        assert row.relative_error == pytest.approx(recorded[row.name], rel=1e-5)


def test_names_of_other_tools_are_those_of_the_source(files, tmp_path):
    gguf, source = files
    prefixed = renamed_gguf(tmp_path / "a.gguf", gguf, lambda name: f"model.diffusion_model.{name}")
    assert verify(prefixed, source) == verify(gguf, source)


def test_exact_copies_have_no_error_and_unmatched_tensors_are_listed(files, tmp_path):
    gguf, source = files
    weights = load_file(source)
    del weights["blocks.1.ffn.0.bias"]
    save_file(weights | {"extra.bias": torch.zeros(4)}, tmp_path / "other.safetensors")
    verification = verify(gguf, tmp_path / "other.safetensors")
    assert verification.missing == ("extra.bias",)
    assert verification.unknown == ("blocks.1.ffn.0.bias",)
    assert "only in the source: extra.bias" in verification.text()
    exact = next(row for row in verification.json()["tensors"] if row["name"] == "head.modulation")
    assert exact["relative_error"] == 0 and exact["sqnr_db"] is None


def test_wrong_source_is_refused(files, tmp_path):
    gguf, _ = files
    save_file({"head.modulation": torch.zeros(1, 2, 128)}, tmp_path / "shape.safetensors")
    with pytest.raises(QuantError, match=r"tensor head\.modulation: shape \(1, 2, 256\), expected \(1, 2, 128\)"):
        verify(gguf, tmp_path / "shape.safetensors")


def test_damaged_data_is_refused(files, tmp_path):
    gguf, source = files
    damaged = bytearray(gguf.read_bytes())
    damaged[-40] ^= 1
    (tmp_path / "damaged.gguf").write_bytes(damaged)
    with pytest.raises(QuantError, match=r"damaged\.gguf: its data is damaged"):
        verify(tmp_path / "damaged.gguf", source)


def test_reports_tell_the_nvfp4_of_ggufs_from_that_of_comfyui(files, tmp_path):
    source = load_file(files[1])
    name, weight = next((name, tensor) for name, tensor in source.items() if name.endswith("ffn.0.weight"))
    qtype = QTYPES["NVFP4"]
    with GGUFWriter(
        tmp_path / "a.gguf", {"general.architecture": "wan"}, [TensorSpec(name, qtype, weight.shape)]
    ) as writer:
        writer.write(name, torch.zeros(qtype.packed_shape(weight.shape), dtype=torch.uint8))
    native = convert(files[1], tmp_path / "a.safetensors", "NVFP4", effort="fast").path
    for path, expected in ((tmp_path / "a.gguf", "NVFP4 (GGUF)"), (native, "NVFP4 (ComfyUI)")):
        assert {row.qtype for row in verify(path, files[1]).tensors if row.name == name} == {expected}
        assert expected in inspect(path).text()
