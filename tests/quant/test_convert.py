"""Conversion: what the file holds, reuse, refusals, interruption."""

from __future__ import annotations

import hashlib
import math
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from wanquant.quant import QTYPES, QuantError, budget, stream
from wanquant.quant.checkpoint import open_checkpoint
from wanquant.quant.convert import convert, convert_all
from wanquant.quant.gguf_file import open_gguf
from wanquant.quant.job import Job, job_metadata
from wanquant.quant.provenance import VERSION, source_metadata
from wanquant.quant.recipe import RECIPES, plan, predicted_size
from wanquant.quant.verify import verify
from wanquant.tests.conftest import ROOT
from wanquant.tests.tiny_wan import write_tiny_wan

PATCH_EMBEDDING = "patch_embedding.weight"
FFN = "blocks.0.ffn.0.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "wan.safetensors"
    return write_tiny_wan(path, layers=1, ffn_dim=512, prefix="model.diffusion_model.", metadata={"config": '{"a": 1}'})


def state_dict(path):
    return {name.removeprefix("model.diffusion_model."): tensor for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_file_is_what_the_recipe_says(tmp_path, source, recipe):
    report = convert(source, tmp_path / "a.gguf", recipe, effort="fast")
    file = open_gguf(report.destination)
    with open_checkpoint(source) as checkpoint:
        types = plan(RECIPES[recipe], checkpoint.tensors).types
    assert {name: tensor.qtype for name, tensor in file.tensors.items()} == types
    assert report.nbytes == os.path.getsize(report.destination)
    for name, weight in state_dict(source).items():
        tensor = file.tensors[name]
        assert tensor.shape == tuple(weight.shape)
        assert torch.equal(tensor.data.flatten(), tensor.qtype.quantize(weight, effort="fast").flatten())


def test_relative_errors_are_recorded(tmp_path, source):
    report = convert(source, tmp_path / "a.gguf", "Q4_0", effort="fast")
    file = open_gguf(report.destination)
    weights = state_dict(source)
    for summary in report.tensors:
        weight = weights[summary.name].float()
        expected = (file.tensors[summary.name].dequantize() - weight).norm() / weight.norm()
        assert summary.relative_error == pytest.approx(expected.item(), rel=1e-4, abs=1e-9)


def test_predicted_size_is_exact(tmp_path, source):
    report = convert(source, tmp_path / "a.gguf", "Q8_0", effort="fast")
    with open_checkpoint(source) as checkpoint:
        job = job_metadata(checkpoint, Job(tmp_path, "Q8_0"), "fast", None, five_d=False)
        types = plan(RECIPES["Q8_0"], checkpoint.tensors).types
        assert predicted_size(types, checkpoint.tensors, job) == report.nbytes


def test_five_dimensions_are_kept_on_request(tmp_path, source):
    flat = convert(source, tmp_path / "flat.gguf", "Q4_0", effort="fast")
    deep = convert(source, tmp_path / "deep.gguf", "Q4_0", effort="fast", five_d=True)
    stored = [open_gguf(report.destination).tensors[PATCH_EMBEDDING] for report in (flat, deep)]
    assert [len(tensor.stored_shape) for tensor in stored] == [4, 5]
    assert stored[0].shape == stored[1].shape == stored[1].stored_shape
    assert torch.equal(*(tensor.dequantize() for tensor in stored))
    with pytest.raises(QuantError, match="made in another way"):
        convert(source, flat.destination, "Q4_0", effort="fast", five_d=True)


def test_metadata_and_five_dimensions(tmp_path, source):
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
    assert torch.equal(patch.dequantize(torch.bfloat16), state_dict(source)[PATCH_EMBEDDING])


def test_version_is_the_packs():
    assert f'version = "{VERSION}"\n' in (ROOT / "pyproject.toml").read_text()


def test_slices_do_not_change_the_result(tmp_path, source, monkeypatch):
    whole = convert(source, tmp_path / "a.gguf", "Q4_0", effort="fast").destination.read_bytes()
    monkeypatch.setitem(stream._SLICE_WEIGHTS, "cpu", 1000)
    sliced = convert(source, tmp_path / "b.gguf", "Q4_0", effort="fast").destination.read_bytes()
    assert len(whole) == len(sliced)
    file = open_gguf(tmp_path / "a.gguf")
    first = min(tensor.offset for tensor in file.tensors.values())
    assert whole[first:] == sliced[first:]


def test_same_job_is_reused(tmp_path, source):
    first = convert(source, tmp_path / "a.gguf", "Q8_0", effort="fast")
    written = first.destination.stat()
    again = convert(source, tmp_path / "a.gguf", "q8_0", effort="fast", overwrite=True)
    assert not first.reused and again.reused
    assert again.tensors == first.tensors
    assert again.destination.stat() == written


def test_touched_source_is_recognised_by_its_content(tmp_path, source):
    copy = shutil.copy(source, tmp_path / "copy.safetensors")
    convert(copy, tmp_path / "a.gguf", "Q8_0", effort="fast")
    os.utime(copy, (1, 1))
    assert convert(copy, tmp_path / "a.gguf", "Q8_0", effort="fast").reused
    with open(copy, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x3f")
    with pytest.raises(QuantError, match="exists, made in another way"):
        convert(copy, tmp_path / "a.gguf", "Q8_0", effort="fast")


def test_other_files_are_only_replaced_when_asked(tmp_path, source):
    destination = tmp_path / "a.gguf"
    destination.write_text("precious")
    with pytest.raises(QuantError, match=r"a\.gguf: exists, made in another way"):
        convert(source, destination, "Q8_0", effort="fast")
    assert destination.read_text() == "precious"
    convert(source, destination, "Q8_0", effort="fast", overwrite=True)
    for job in ({"recipe": "Q4_0"}, {"effort": "best"}, {"importance": {FFN: torch.ones(256)}}):
        with pytest.raises(QuantError, match="exists, made in another way"):
            convert(source, destination, **({"recipe": "Q8_0", "effort": "fast"} | job))


@pytest.mark.parametrize("after", [0, 5])
def test_interruption_leaves_nothing(tmp_path, source, after):
    class InterruptProcessingException(BaseException):
        """The host's own is no Exception."""

    calls = []

    def progress(*call):
        calls.append(call)
        if len(calls) > after:
            raise InterruptProcessingException

    with pytest.raises(InterruptProcessingException):
        convert(source, tmp_path / "a.gguf", "Q8_0", effort="fast", progress=progress)
    assert not list(tmp_path.iterdir())


def test_progress_counts_source_bytes(tmp_path, source):
    calls = []
    convert(source, tmp_path / "a.gguf", "Q8_0", effort="fast", progress=lambda *call: calls.append(call))
    done, totals, names = zip(*calls, strict=True)
    nbytes = sum(tensor.nbytes for tensor in load_file(source).values())
    assert list(done) == sorted(done) and done[-1] == nbytes
    assert set(totals) == {nbytes}
    assert set(names) == state_dict(source).keys()


def test_several_files_in_one_pass_equal_single_ones(tmp_path, source):
    recipes = ("Q8_0", "Q4_K_M", "Q2_K")
    calls = []
    jobs = [Job(tmp_path / f"{recipe}.gguf", recipe) for recipe in recipes]
    reports = convert_all(source, jobs, effort="fast", progress=lambda *call: calls.append(call))
    for recipe, report in zip(recipes, reports, strict=True):
        single = convert(source, tmp_path / "single.gguf", recipe, effort="fast", overwrite=True)
        assert report.destination.read_bytes() == single.destination.read_bytes()
    assert calls[-1][0] == calls[-1][1], "every source byte counts once"
    (tmp_path / "Q4_K_M.gguf").unlink()
    assert [report.reused for report in convert_all(source, jobs, effort="fast")] == [True, False, True]


@pytest.mark.parametrize("slices", [0, 3])
def test_disk_that_fills_midway_leaves_nothing(tmp_path, source, monkeypatch, slices):
    calls = []

    def write_part(_writer, name, _packed):
        calls.append(name)
        if len(calls) > slices:
            raise QuantError("no space left")

    monkeypatch.setattr(stream.GGUFWriter, "write_part", write_part)
    with pytest.raises(QuantError, match="no space left"):
        convert(source, tmp_path / "a.gguf", "Q8_0", effort="fast")
    assert not list(tmp_path.iterdir())
    assert len(calls) == slices + 1, "nothing is written after a failure"


def test_destination_in_use_on_windows(tmp_path, source, monkeypatch, caplog):
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


def test_refused_destinations(tmp_path, source, monkeypatch):
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


def test_refused_settings(tmp_path, source):
    for settings in ({"recipe": "Q9"}, {"device": "nonsense"}, {"effort": "more"}):
        with pytest.raises(QuantError):
            convert(source, tmp_path / "a.gguf", **settings)
    assert not list(tmp_path.iterdir())


def test_source_that_changes_meanwhile(tmp_path, source):
    copy = shutil.copy(source, tmp_path / "copy.safetensors")
    with pytest.raises(QuantError, match=r"copy\.safetensors: the file was changed"):
        convert(copy, tmp_path / "a.gguf", "F16", progress=lambda *_: os.utime(copy, (1, 1)))
    assert [path.name for path in tmp_path.iterdir()] == ["copy.safetensors"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: os.truncate(path, path.stat().st_size // 2), "ends before byte"),
        (lambda path: path.unlink(), r"copy\.safetensors: "),
        (lambda path: os.replace(shutil.copy(path, f"{path}.new"), path), "the file was changed"),
    ],
    ids=["cut", "deleted", "replaced"],
)
def test_source_that_goes_midway(tmp_path, source, change, message):
    copy = tmp_path / "copy.safetensors"
    shutil.copy(source, copy)
    seen = []

    def progress(*_):
        seen.append(1)
        if len(seen) == 2:
            change(copy)

    with pytest.raises(QuantError, match=message):
        convert(copy, tmp_path / "a.gguf", "Q8_0", effort="fast", progress=progress)
    assert {path.name for path in tmp_path.iterdir()} <= {"copy.safetensors"}


def write_head(path, weight):
    save_file({"head.modulation": torch.ones(1, 2, 256), "head.head.weight": weight}, path)
    return path


def test_values_beyond_f16_become_bf16(tmp_path):
    weight = torch.randn(64, 256)
    weight[3, 3] = 1e6
    report = convert(write_head(tmp_path / "a.safetensors", weight), tmp_path / "a.gguf", "F16")
    assert [(f.name, f.got, f.reason) for f in report.fallbacks] == [
        ("head.head.weight", "BF16", "values beyond the range of F16")
    ]
    assert open_gguf(tmp_path / "a.gguf").tensors["head.head.weight"].qtype is QTYPES["BF16"]
    again = convert(tmp_path / "a.safetensors", tmp_path / "a.gguf", "F16")
    assert again.reused and again.fallbacks == report.fallbacks


def test_reused_file_tells_its_fallbacks(tmp_path):
    source = tmp_path / "a.safetensors"
    save_file({"head.modulation": torch.ones(1, 2, 256), "blocks.0.ffn.0.weight": torch.randn(64, 96)}, source)
    first, again = (convert(source, tmp_path / "a.gguf", "Q4_K_M", effort="fast") for _ in range(2))
    assert again.reused and [f.name for f in again.fallbacks] == ["blocks.0.ffn.0.weight"]
    assert again.fallbacks == first.fallbacks


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_refused(tmp_path, value):
    weight = torch.randn(64, 256)
    weight[3, 3] = value
    with pytest.raises(QuantError, match=r"tensor head\.head\.weight: holds NaN or infinity"):
        convert(write_head(tmp_path / "a.safetensors", weight), tmp_path / "a.gguf", "Q8_0")
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize(
    ("settings", "value"),
    [({"recipe": "Q8_0"}, math.nan), ({"recipe": "F16"}, -math.inf), ({"target_size": 0.003}, math.nan)],
    ids=str,
)
def test_weights_that_are_not_finite(tmp_path, source, settings, value, monkeypatch):
    monkeypatch.setattr(budget, "_SAMPLED_WEIGHTS", 1 << 12)
    state = state_dict(source)
    state[FFN] = state[FFN].clone()
    state[FFN][0, 7] = state[FFN][256, 0] = value
    save_file(state, tmp_path / "a.safetensors")
    settings = {"effort": "fast", **settings}
    with pytest.raises(QuantError, match=r"tensor blocks\.0\.ffn\.0\.weight: holds NaN or infinity"):
        convert(tmp_path / "a.safetensors", tmp_path / "a.gguf", **settings)
    assert not (tmp_path / "a.gguf").exists()
    report = convert(tmp_path / "a.safetensors", tmp_path / "a.gguf", **settings, allow_non_finite=True)
    assert report.warnings == (f"NaN or infinity became 0 in 1 tensors, the first is {FFN}",)
    expected = torch.where(state[FFN].isfinite(), state[FFN], 0).float()
    error = (open_gguf(report.path).tensors[FFN].dequantize() - expected).norm() / expected.norm()
    assert error == pytest.approx(next(t.relative_error for t in report.tensors if t.name == FFN), rel=1e-3, abs=1e-9)
    assert all(math.isfinite(tensor.noise) for tensor in verify(report.path, tmp_path / "a.safetensors").tensors)
    assert convert(tmp_path / "a.safetensors", tmp_path / "a.gguf", **settings, allow_non_finite=True).reused
    with pytest.raises(QuantError, match="made in another way"):
        convert(tmp_path / "a.safetensors", tmp_path / "a.gguf", **settings)


def test_allowing_changes_nothing_in_a_sound_file(tmp_path, source):
    plain = convert(source, tmp_path / "a.gguf", "Q4_0", effort="fast")
    allowed = convert(source, tmp_path / "b.gguf", "Q4_0", effort="fast", allow_non_finite=True)
    assert allowed.warnings == ()
    tensors = [open_gguf(report.path).tensors for report in (plain, allowed)]
    assert all(torch.equal(tensor.data, tensors[1][name].data) for name, tensor in tensors[0].items())


def test_float_gguf_gives_the_same_weights(tmp_path, source):
    convert(source, tmp_path / "bf16.gguf", "BF16")
    convert(tmp_path / "bf16.gguf", tmp_path / "a.gguf", "Q8_0", effort="fast")
    convert(source, tmp_path / "b.gguf", "Q8_0", effort="fast")
    a, b = open_gguf(tmp_path / "a.gguf"), open_gguf(tmp_path / "b.gguf")
    assert source_metadata(a.metadata) == source_metadata(b.metadata)
    for name, tensor in a.tensors.items():
        assert tensor.qtype == b.tensors[name].qtype
        assert torch.equal(tensor.data, b.tensors[name].data)
