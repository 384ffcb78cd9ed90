"""Running conversions: slices, progress, interruptions, and values that are not finite."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from wanquant.quant import QuantError
from wanquant.quant.conversion import stream
from wanquant.quant.conversion.convert import convert
from wanquant.quant.gguf.reader import open_gguf
from wanquant.quant.inspection.verify import verify
from wanquant.quant.plan import target_size as budget
from wanquant.testing.tiny_wan import completed

FFN = "blocks.0.ffn.0.weight"


def test_slices_do_not_change_the_result(tmp_path, source, monkeypatch):
    whole = convert(source, tmp_path / "a.gguf", "Q4_0", effort="fast").destination.read_bytes()
    monkeypatch.setattr(stream, "_CPU_SLICE", 1000)
    sliced = convert(source, tmp_path / "b.gguf", "Q4_0", effort="fast").destination.read_bytes()
    assert len(whole) == len(sliced)
    file = open_gguf(tmp_path / "a.gguf")
    first = min(tensor.offset for tensor in file.tensors.values())
    assert whole[first:] == sliced[first:]


def test_only_the_calling_thread_uses_the_device(tmp_path, source, monkeypatch):
    """ComfyUI's hook in CUDA's allocator makes two threads that allocate block each other, as seen on an H100."""
    threads, own = set(), Tensor.to

    def to(tensor, *arguments, **keywords):
        if torch.device("cpu") in arguments:
            threads.add(threading.current_thread())
        return own(tensor, *arguments, **keywords)

    monkeypatch.setattr(Tensor, "to", to)
    convert(source, tmp_path / "a.gguf", "Q4_0", effort="fast")
    assert threads == {threading.current_thread()}


def test_progress_counts_source_bytes(tmp_path, source, state):
    calls = []
    convert(source, tmp_path / "a.gguf", "Q8_0", effort="fast", progress=lambda *call: calls.append(call))
    done, totals, names = zip(*calls, strict=True)
    nbytes = sum(tensor.nbytes for tensor in load_file(source).values())
    assert list(done) == sorted(done) and done[-1] == nbytes
    assert set(totals) == {nbytes}
    assert set(names) == state.keys()


@pytest.mark.parametrize("after", [0, 5])
def test_interruption_leaves_no_file(tmp_path, source, after):
    class InterruptProcessingException(BaseException):
        """ComfyUI's class of this name is not a subclass of Exception either."""

    calls = []

    def progress(*call):
        calls.append(call)
        if len(calls) > after:
            raise InterruptProcessingException

    with pytest.raises(InterruptProcessingException):
        convert(source, tmp_path / "a.gguf", "Q8_0", effort="fast", progress=progress)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("slices", [0, 3])
def test_full_disk_leaves_no_file(tmp_path, source, monkeypatch, slices):
    calls = []

    def write_part(_writer, name, _packed):
        calls.append(name)
        if len(calls) > slices:
            raise QuantError("no space left")

    monkeypatch.setattr(stream.TensorWriter, "write_part", write_part)
    with pytest.raises(QuantError, match="no space left"):
        convert(source, tmp_path / "a.gguf", "Q8_0", effort="fast")
    assert not list(tmp_path.iterdir())
    assert len(calls) == slices + 1, "nothing is written after a failure"


def test_touched_source_is_refused(tmp_path, source):
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
def test_source_that_is_changed_or_deleted_is_refused(tmp_path, source, change, message):
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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    weight = torch.randn(64, 256)
    weight[3, 3] = value
    save_file(completed({"head.head.weight": weight}), tmp_path / "a.safetensors")
    with pytest.raises(QuantError, match=r"tensor head\.head\.weight: holds NaN or infinity"):
        convert(tmp_path / "a.safetensors", tmp_path / "a.gguf", "Q8_0")
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize(
    ("settings", "value"),
    [({"recipe": "Q8_0"}, math.nan), ({"recipe": "F16"}, -math.inf), ({"target_size": 0.003}, math.nan)],
    ids=str,
)
def test_weights_that_are_not_finite_become_0_on_request(tmp_path, source, settings, value, monkeypatch, state):
    monkeypatch.setattr(budget, "_SAMPLED_ELEMENTS", 1 << 12)
    state = state
    state[FFN] = state[FFN].clone()
    state[FFN][0, 7] = state[FFN][256, 0] = value
    save_file(state, tmp_path / "a.safetensors")
    settings = {"effort": "fast", **settings}
    with pytest.raises(QuantError, match=r"tensor blocks\.0\.ffn\.0\.weight: holds NaN or infinity"):
        convert(tmp_path / "a.safetensors", tmp_path / "a.gguf", **settings)
    assert not (tmp_path / "a.gguf").exists()
    report = convert(tmp_path / "a.safetensors", tmp_path / "a.gguf", **settings, allow_non_finite=True)
    assert report.warnings == (f"NaN or infinity became 0 in 1 tensor, the first is {FFN}",)
    expected = torch.where(state[FFN].isfinite(), state[FFN], 0).float()
    error = (open_gguf(report.path).tensors[FFN].dequantize() - expected).norm() / expected.norm()
    assert error == pytest.approx(next(t.relative_error for t in report.tensors if t.name == FFN), rel=1e-3, abs=1e-9)
    assert all(math.isfinite(tensor.noise) for tensor in verify(report.path, tmp_path / "a.safetensors").tensors)
    assert convert(tmp_path / "a.safetensors", tmp_path / "a.gguf", **settings, allow_non_finite=True).reused
    with pytest.raises(QuantError, match="is not this conversion"):
        convert(tmp_path / "a.safetensors", tmp_path / "a.gguf", **settings)


def test_allowing_non_finite_does_not_change_finite_tensors(tmp_path, source):
    plain = convert(source, tmp_path / "a.gguf", "Q4_0", effort="fast")
    allowed = convert(source, tmp_path / "b.gguf", "Q4_0", effort="fast", allow_non_finite=True)
    assert allowed.warnings == ()
    tensors = [open_gguf(report.path).tensors for report in (plain, allowed)]
    assert all(torch.equal(tensor.data, tensors[1][name].data) for name, tensor in tensors[0].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [1e20, -3e38])
@pytest.mark.parametrize("recipe", ["BF16", "F16"])
def test_large_finite_value_is_stored(tmp_path, value, dtype, recipe, state):
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    for name in (FFN, "blocks.0.ffn.0.bias"):
        state[name].view(-1)[7] = value
    save_file(state, tmp_path / "a.safetensors")
    report = convert(tmp_path / "a.safetensors", tmp_path / "a.gguf", recipe, effort="fast")
    assert report.warnings == ()
    for name in (FFN, "blocks.0.ffn.0.bias"):
        stored = open_gguf(report.path).tensors[name].dequantize().view(-1)
        assert stored[7].item() == pytest.approx(value, rel=2**-8)
        assert stored.isfinite().all()
    assert all(math.isfinite(tensor.relative_error) for tensor in report.tensors)
    assert all(math.isfinite(tensor.noise) for tensor in verify(report.path, tmp_path / "a.safetensors").tensors)


@pytest.mark.parametrize("effort", ["fast", "best"])
@pytest.mark.parametrize(
    ("recipe", "value"),
    [
        *itertools.product(["Q8_0", "Q4_0", "Q5_1", "Q4_K_M", "Q6_K", "Q3_K_M", "Q2_K"], [1e20, 3e38]),
        *itertools.product(["Q8_0", "Q4_0", "Q5_1", "Q2_K"], [2e7]),
    ],
)
def test_value_beyond_the_range_of_a_type_is_refused_as_that(tmp_path, recipe, value, effort, state):
    state[FFN].view(-1)[7] = value
    save_file(state, tmp_path / "a.safetensors")
    message = (
        r"a\.gguf: tensor blocks\.0\.ffn\.0\.weight: the value \S+ is beyond the range of Q\d_\w+; choose a recipe"
    )
    with pytest.raises(QuantError, match=message):
        convert(tmp_path / "a.safetensors", tmp_path / "a.gguf", recipe, effort=effort)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("recipe", ["Q8_0", "Q4_0", "Q4_K_M", "Q6_K", "Q2_K"])
@pytest.mark.parametrize("effort", ["fast", "best"])
def test_outlier_within_the_range_of_a_type_is_stored(tmp_path, recipe, effort, state):
    state[FFN].view(-1)[7] = 3e5
    save_file(state, tmp_path / "a.safetensors")
    report = convert(tmp_path / "a.safetensors", tmp_path / "a.gguf", recipe, effort=effort)
    assert open_gguf(report.path).tensors[FFN].dequantize().view(-1)[7].item() == pytest.approx(3e5, rel=0.05)


def test_target_size_chooses_a_type_that_holds_a_large_value(tmp_path, monkeypatch, state):
    monkeypatch.setattr(budget, "_SAMPLED_ELEMENTS", 1 << 20)
    state[FFN].view(-1)[7] = 1e20
    save_file(state, tmp_path / "a.safetensors")
    report = convert(tmp_path / "a.safetensors", tmp_path / "a.gguf", target_size=0.0045, effort="fast")
    tensor = open_gguf(report.path).tensors[FFN]
    assert tensor.qtype.name == "BF16"
    assert tensor.dequantize().view(-1)[7].item() == pytest.approx(1e20, rel=2**-8)
