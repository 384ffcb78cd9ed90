"""Conversion: the contents of the file, and the requests that are refused."""

from __future__ import annotations

import hashlib
import os
import shutil

import numpy as np
import pytest
import torch

from wanquant.quant import QTYPES, QuantError
from wanquant.quant.conversion.convert import convert, convert_all
from wanquant.quant.conversion.output import Output
from wanquant.quant.conversion.settings import Settings, Target
from wanquant.quant.gguf.provenance import VERSION, source_metadata
from wanquant.quant.gguf.reader import open_gguf
from wanquant.quant.plan.file_size import predicted_size
from wanquant.quant.plan.recipe import GGUF_RECIPES, RECIPES, plan_types
from wanquant.quant.sources.checkpoint import open_checkpoint
from wanquant.tests.conftest import ROOT

PATCH_EMBEDDING = "patch_embedding.weight"
FFN = "blocks.0.ffn.0.weight"


@pytest.mark.parametrize("recipe", GGUF_RECIPES)
def test_types_and_bytes_are_those_of_the_recipe(tmp_path, source, recipe, state):
    # ggml has no encoder for the smallest types without importance.
    needed = any(QTYPES[name].fast_in_c == "requires importance" for name in RECIPES[recipe].types)
    importance = {name: torch.ones(w.shape[1]) for name, w in state.items() if w.ndim == 2} if needed else None
    report = convert(source, tmp_path / "a.gguf", recipe, effort="fast", importance=importance)
    file = open_gguf(report.destination)
    with open_checkpoint(source) as checkpoint:
        types = plan_types(RECIPES[recipe], checkpoint.tensors).types
    assert {name: tensor.qtype for name, tensor in file.tensors.items()} == types
    assert report.nbytes == os.path.getsize(report.destination)
    for name, weight in state.items():
        tensor = file.tensors[name]
        assert tensor.shape == tuple(weight.shape)
        row = None if importance is None else importance.get(name)
        assert torch.equal(tensor.data.flatten(), tensor.qtype.quantize(weight, row, effort="fast").flatten())


def test_relative_errors_are_recorded(tmp_path, source, state):
    report = convert(source, tmp_path / "a.gguf", "Q4_0", effort="fast")
    file = open_gguf(report.destination)
    weights = state
    for summary in report.tensors:
        weight = weights[summary.name].float()
        expected = (file.tensors[summary.name].dequantize() - weight).norm() / weight.norm()
        assert summary.relative_error == pytest.approx(expected.item(), rel=1e-4, abs=1e-9)


def test_predicted_size_is_exact(tmp_path, source):
    report = convert(source, tmp_path / "a.gguf", "Q8_0", effort="fast")
    with open_checkpoint(source) as checkpoint:
        output = Output.of(Target(report.path, "Q8_0"), checkpoint, Settings(effort="fast"))
        types = plan_types(RECIPES["Q8_0"], checkpoint.tensors).types
        assert predicted_size(types, checkpoint.tensors, output.metadata) == report.nbytes


def test_five_d_stores_five_dimensions(tmp_path, source):
    flat = convert(source, tmp_path / "flat.gguf", "Q4_0", effort="fast")
    deep = convert(source, tmp_path / "deep.gguf", "Q4_0", effort="fast", five_d=True)
    stored = [open_gguf(report.destination).tensors[PATCH_EMBEDDING] for report in (flat, deep)]
    assert [len(tensor.stored_shape) for tensor in stored] == [4, 5]
    assert stored[0].shape == stored[1].shape == stored[1].stored_shape
    assert torch.equal(*(tensor.dequantize() for tensor in stored))
    with pytest.raises(QuantError, match="is not this conversion"):
        convert(source, flat.destination, "Q4_0", effort="fast", five_d=True)


def test_metadata_and_shape_of_the_patch_embedding(tmp_path, source, state):
    file = open_gguf(convert(source, tmp_path / "a.gguf", "Q8_0", effort="fast").destination)
    metadata = file.metadata
    assert metadata["general.architecture"] == "wan"
    assert metadata["general.quantization_version"] == 2
    assert metadata["general.file_type"] == 7
    assert metadata["general.name"] == "wan"
    assert metadata["wanquant.version"] == VERSION
    assert metadata["wanquant.source_size"] == source.stat().st_size
    assert metadata["wanquant.source_mtime_ns"] == source.stat().st_mtime_ns
    assert metadata["wanquant.source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert metadata["wanquant.source_dtype"] == "BF16"
    assert metadata["wanquant.relative_error"].dtype == np.float32
    assert source_metadata(metadata) == {"config": '{"a": 1}'}
    patch = file.tensors[PATCH_EMBEDDING]
    assert len(patch.shape) == 5 and len(patch.stored_shape) == 4
    assert torch.equal(patch.dequantize(torch.bfloat16), state[PATCH_EMBEDDING])


def test_version_is_that_of_the_pack():
    assert f'version = "{VERSION}"\n' in (ROOT / "pyproject.toml").read_text()


def test_files_of_one_pass_equal_files_converted_one_by_one(tmp_path, source):
    recipes = ("Q8_0", "Q4_K_M", "Q2_K")
    calls = []
    targets = [Target(tmp_path / f"{recipe}.gguf", recipe) for recipe in recipes]
    reports = convert_all(source, targets, Settings(effort="fast"), progress=lambda *call: calls.append(call))
    for recipe, report in zip(recipes, reports, strict=True):
        single = convert(source, tmp_path / "single.gguf", recipe, effort="fast", overwrite=True)
        assert report.destination.read_bytes() == single.destination.read_bytes()
    assert calls[-1][0] == calls[-1][1], "every source byte counts once"
    (tmp_path / "Q4_K_M.gguf").unlink()
    assert [report.reused for report in convert_all(source, targets, Settings(effort="fast"))] == [True, False, True]


def test_float_gguf_gives_the_same_weights(tmp_path, source):
    convert(source, tmp_path / "bf16.gguf", "BF16")
    convert(tmp_path / "bf16.gguf", tmp_path / "a.gguf", "Q8_0", effort="fast")
    convert(source, tmp_path / "b.gguf", "Q8_0", effort="fast")
    a, b = open_gguf(tmp_path / "a.gguf"), open_gguf(tmp_path / "b.gguf")
    assert source_metadata(a.metadata) == source_metadata(b.metadata)
    for name, tensor in a.tensors.items():
        assert tensor.qtype == b.tensors[name].qtype
        assert torch.equal(tensor.data, b.tensors[name].data)


def test_file_gets_another_name_if_the_destination_is_in_use(tmp_path, source, monkeypatch, caplog):
    destination = tmp_path / "a.gguf"
    destination.write_text("mapped by a program")

    def replace_as_windows_does(_from, to):
        if os.path.exists(to):
            raise PermissionError(13, "Access is denied")

    monkeypatch.setattr(os, "replace", replace_as_windows_does)
    report = convert(source, destination, "Q8_0", effort="fast", overwrite=True)
    assert report.destination == tmp_path / "a-1.gguf"
    assert "a.gguf is in use" in caplog.text
    assert destination.read_text() == "mapped by a program"
    assert open_gguf(report.destination).metadata["wanquant.recipe"] == "Q8_0"


def test_unusable_destinations_are_refused(tmp_path, source, monkeypatch):
    with pytest.raises(QuantError, match=r"a\.bin: not a \.gguf name"):
        convert(source, tmp_path / "a.bin")
    with pytest.raises(QuantError, match="its folder does not exist"):
        convert(source, tmp_path / "no" / "a.gguf")
    link = tmp_path / "link.gguf"
    link.symlink_to(source)
    with pytest.raises(QuantError, match="is the source itself"):
        convert(source, link, overwrite=True)
    link.unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(QuantError, match=r"a\.gguf: 0\.\d\d GiB needed, 0\.00 GiB free"):
        convert(source, tmp_path / "a.gguf", "Q8_0")
    assert not list(tmp_path.iterdir())


def test_unknown_settings_are_refused(tmp_path, source):
    for settings in ({"recipe": "Q9"}, {"device": "nonsense"}, {"effort": "more"}):
        with pytest.raises(QuantError):
            convert(source, tmp_path / "a.gguf", **settings)
    assert not list(tmp_path.iterdir())
