"""Conversion to ComfyUI's own formats: the whole file, whose codes tests/quant/native checks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wanquant.quant import QuantError, open_gguf
from wanquant.quant.conversion import convert as convert_module
from wanquant.quant.conversion import resources
from wanquant.quant.conversion.convert import convert, convert_all
from wanquant.quant.conversion.settings import Settings, Target
from wanquant.quant.files.safetensors_header import read_safetensors_header
from wanquant.quant.inspection.report import inspect
from wanquant.quant.inspection.verify import verify
from wanquant.quant.native.registry import NATIVE
from wanquant.quant.sources.checkpoint import open_checkpoint
from wanquant.quant.statistics.importance import Importance
from wanquant.testing.hosts import ROOT
from wanquant.testing.tiny_wan import write_tiny_wan

LAYER, DOWN = "blocks.0.ffn.0", "blocks.0.ffn.2.weight"


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """Return the path of a two-layer Wan in bfloat16 with metadata of its own."""
    path = tmp_path_factory.mktemp("wan") / "wan.safetensors"
    return write_tiny_wan(path, layers=2, ffn_dim=512, metadata={"config": '{"a": 1}', "format": "pt"})


@pytest.mark.parametrize("name", NATIVE)
def test_layers_of_blocks_are_quantized_and_everything_else_is_kept(name, wan, tmp_path):
    report = convert(wan, tmp_path / "a.safetensors", name)
    source, stored = load_file(wan), load_file(report.path)
    layers = {key.removesuffix(".comfy_quant") for key in stored if key.endswith(".comfy_quant")}
    assert layers == {
        key.removesuffix(".weight")
        for key in source
        if key.startswith("blocks.") and source[key].ndim == 2 and key.endswith(".weight")
    }
    for key, tensor in source.items():
        if key.removesuffix(".weight") not in layers:
            assert torch.equal(stored[key], tensor) and stored[key].dtype == tensor.dtype
    marker = bytes(stored[f"{LAYER}.comfy_quant"].tolist())
    assert json.loads(marker) == NATIVE[name].config
    assert report.nbytes == os.path.getsize(report.path)
    assert not report.fallbacks


@pytest.mark.parametrize("name", NATIVE)
def test_errors_are_those_that_another_reader_finds(name, wan, tmp_path, monkeypatch):
    """A Python without ComfyUI's packages reads what it wrote."""
    monkeypatch.setitem(sys.modules, "comfy_kitchen", None)
    report = convert(wan, tmp_path / "a.safetensors", name)
    recorded = {tensor.name: tensor.relative_error for tensor in report.tensors}
    found = verify(report.path, wan)
    assert not found.missing and not found.unknown
    for tensor in found.tensors:
        assert tensor.relative_error == pytest.approx(recorded[tensor.name], rel=1e-3, abs=1e-9)
    assert 0 < found.by_role[-1].relative_error < 0.1
    kinds = {tensor.qtype for tensor in found.tensors if tensor.name == f"{LAYER}.weight"}
    assert kinds == {total.qtype for total in report.by_type} - {"BF16"}


def test_metadata_tells_source_and_settings(wan, tmp_path):
    report = convert(wan, tmp_path / "a.safetensors", "INT8", effort="fast")
    with safe_open(report.path, "pt") as file:
        text = file.metadata()
    assert (text["config"], text["format"]) == ('{"a": 1}', "pt")
    assert (text["wanquant.recipe"], text["wanquant.effort"]) == ("INT8", "fast")
    assert text["wanquant.source_size"] == str(os.path.getsize(wan))
    assert not any(key.startswith("general.") for key in text)
    header = inspect(report.path)
    assert header.metadata["wanquant.source_mtime_ns"] == wan.stat().st_mtime_ns
    assert json.loads(json.dumps(report.json()))["types"][0]["qtype"] in ("INT8", "BF16")


def test_the_same_conversion_is_reused_and_another_is_refused(wan, tmp_path):
    first = convert(wan, tmp_path / "a.safetensors", "INT8")
    before = first.path.read_bytes()
    assert convert(wan, first.path, "INT8").reused
    with pytest.raises(QuantError, match="is not this conversion"):
        convert(wan, first.path, "W4A8")
    assert first.path.read_bytes() == before
    assert not convert(wan, first.path, "W4A8", overwrite=True).reused


@pytest.mark.parametrize(("name", "recipe"), [("a.gguf", "INT8"), ("a.safetensors", "Q8_0"), ("a", "FP8")])
def test_a_name_with_another_suffix_is_refused(name, recipe, wan, tmp_path):
    with pytest.raises(QuantError, match=rf"not a \.\w+ name, which {recipe} writes"):
        convert(wan, tmp_path / name, recipe)
    assert not list(tmp_path.iterdir())


def test_one_pass_makes_both_containers(wan, tmp_path):
    names = {"INT8": "a.safetensors", "Q8_0": "a.gguf", "NVFP4": "b.safetensors"}
    targets = [Target(tmp_path / name, recipe) for recipe, name in names.items()]
    convert_all(wan, targets, Settings(effort="fast"))
    for target in targets:
        alone = convert(wan, tmp_path / f"alone{target.suffix}", target.recipe, effort="fast", overwrite=True)
        assert alone.path.read_bytes() == target.destination.read_bytes()


def test_native_to_gguf_and_back(wan, tmp_path):
    native = convert(wan, tmp_path / "a.safetensors", "INT8").path
    packed = convert(native, tmp_path / "a.gguf", "Q8_0")
    assert any("quantized already" in warning for warning in packed.warnings)
    assert verify(packed.path, wan).by_role[-1].relative_error < 0.012
    back = convert(packed.path, tmp_path / "b.safetensors", "FP8")
    assert verify(back.path, wan).by_role[-1].relative_error < 0.035
    assert len(open_gguf(packed.path).tensors) == len(back.tensors)


def test_a_sources_own_list_of_formats_is_not_carried(wan, tmp_path):
    """ComfyUI prefers that list to the markers, and it would describe other codes."""
    source, path = load_file(wan), tmp_path / "fp8.safetensors"
    weight = source[f"{LAYER}.weight"].float()
    source[f"{LAYER}.weight"] = (weight / weight.abs().max() * 448).to(torch.float8_e4m3fn)
    source[f"{LAYER}.weight_scale"] = weight.abs().max() / 448
    declared = {"format_version": "1.0", "layers": {LAYER: {"format": "float8_e4m3fn"}}}
    save_file(source, path, metadata={"_quantization_metadata": json.dumps(declared), "config": "{}"})
    report = convert(path, tmp_path / "a.safetensors", "INT8")
    with safe_open(report.path, "pt") as file:
        assert "_quantization_metadata" not in file.metadata()
        assert file.metadata()["config"] == "{}"
    assert verify(report.path, wan).by_role[-1].relative_error < 0.03


@pytest.mark.parametrize("name", [name for name in NATIVE if name != "FP8"])
def test_weights_that_do_not_fit_get_the_next_format(name, wan, tmp_path):
    source = load_file(wan)
    source["blocks.0.ffn.2.weight"] = torch.randn(256, 100).bfloat16()
    source[f"{LAYER}.weight"], source[f"{LAYER}.bias"] = torch.randn(100, 256).bfloat16(), torch.randn(100).bfloat16()
    save_file(source, tmp_path / "odd.safetensors")
    report = convert(tmp_path / "odd.safetensors", tmp_path / "a.safetensors", name)
    # Other formats would be padded, and rows that are padded are those of the layer to whoever reads the file.
    padded = {"MXFP8": 32, "NVFP4": 16}.get(name)
    assert [fallback.name for fallback in report.fallbacks] == [*([f"{LAYER}.weight"] if padded else []), DOWN]
    assert {(fallback.wanted, fallback.got) for fallback in report.fallbacks} == {(name, "FP8")}
    reason = f"256x100 weights, not multiples of {padded}" if padded else "rows of 100, not a multiple of 256"
    assert f"{DOWN}: FP8 instead of {name}: {reason}" in report.text()
    stored = load_file(report.path)
    assert stored[DOWN].dtype == torch.float8_e4m3fn
    assert json.loads(bytes(stored["blocks.0.ffn.2.comfy_quant"].tolist())) == NATIVE["FP8"].config
    verify(report.path, tmp_path / "odd.safetensors")
    assert not convert(wan, tmp_path / "b.safetensors", name).fallbacks


@pytest.mark.parametrize("name", NATIVE)
def test_weights_that_no_format_takes_stay_as_they_are(name, wan, tmp_path):
    """A file of an odd number of bytes before the next tensor could not be mapped."""
    source = load_file(wan)
    source[f"{LAYER}.weight"] = torch.randn(101, 257).bfloat16()
    source[f"{LAYER}.bias"] = torch.randn(101).bfloat16()
    save_file(source, tmp_path / "odd.safetensors")
    report = convert(tmp_path / "odd.safetensors", tmp_path / "a.safetensors", name, effort="fast")
    (fallback,) = report.fallbacks
    assert (fallback.name, fallback.got) == (f"{LAYER}.weight", "F32")
    assert load_file(report.path)[f"{LAYER}.weight"].dtype == torch.float32


KILLED = """
import sys, types, os, signal
package = types.ModuleType("wanquant")
package.__path__ = [sys.argv[1]]
sys.modules["wanquant"] = package
from wanquant.quant.conversion.convert import convert
seen = []
def progress(done, total, name):
    seen.append(name)
    if len(set(seen)) == 30:
        os.kill(os.getpid(), signal.SIGKILL)
convert(sys.argv[2], sys.argv[3], "INT8", progress=progress)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_conversion_continues_with_the_same_bytes(wan, tmp_path, caplog):
    expected = convert(wan, tmp_path / "whole.safetensors", "INT8").path.read_bytes()
    path = tmp_path / "a.safetensors"
    process = subprocess.run([sys.executable, "-I", "-c", KILLED, str(ROOT), str(wan), str(path)], check=False)
    assert process.returncode == -signal.SIGKILL
    assert not path.exists() and (tmp_path / ".a.safetensors.journal").exists()
    convert(wan, path, "INT8")
    assert "resumed after" in caplog.text
    assert path.read_bytes() == expected
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.safetensors", "whole.safetensors"]


def test_damaged_data_is_found(wan, tmp_path):
    path = convert(wan, tmp_path / "a.safetensors", "INT8").path
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(QuantError, match="its data is damaged"):
        verify(path, wan)


def test_every_tensor_starts_where_its_dtype_can_be_mapped(wan, tmp_path):
    odd = tmp_path / "odd.safetensors"
    save_file(load_file(wan) | {"blocks.0.added": torch.ones(3, dtype=torch.bfloat16)}, odd)
    for name in NATIVE:
        _, entries = read_safetensors_header(convert(odd, tmp_path / f"{name}.safetensors", name, effort="fast").path)
        sizes = {"F32": 4, "BF16": 2, "F16": 2}
        assert not any(entry.begin % sizes.get(entry.dtype, 1) for entry in entries)


def test_bytes_are_the_same_for_any_number_of_threads(wan, tmp_path):
    threads = torch.get_num_threads()
    written = []
    for count in (1, 2):
        torch.set_num_threads(count)
        written.append(convert(wan, tmp_path / f"{count}.safetensors", "W4A8").path.read_bytes())
    torch.set_num_threads(threads)
    assert written[0] == written[1]


def test_sources_are_read_again(wan, tmp_path):
    """What was written is a source in ComfyUI's formats."""
    for name in NATIVE:
        path = convert(wan, tmp_path / f"{name}.safetensors", name, effort="fast").path
        with open_checkpoint(path) as checkpoint:
            checkpoint.check_complete()
            assert len(checkpoint.tensors) == len(load_file(wan))


def test_a_device_without_fp8_leaves_it_to_the_cpu(wan, tmp_path, monkeypatch, caplog):
    """A CPU stands in for such a device, which is not here."""
    wanted = convert(wan, tmp_path / "a.safetensors", "INT8", effort="fast").path.read_bytes()
    monkeypatch.setattr(convert_module, "has_float8", lambda device: False)
    found = convert(wan, tmp_path / "b.safetensors", "INT8", effort="fast").path.read_bytes()
    assert found == wanted
    assert "need FP8" in caplog.text


def test_a_whole_weight_counts_as_main_memory(wan, tmp_path, monkeypatch):
    """The largest weight has 512 x 256 values; the limit lies between what both containers need."""
    limit = resources._ENCODING_BYTES + 512 * 256 * 10
    monkeypatch.setattr(resources, "free_memory", lambda: limit)
    convert(wan, tmp_path / "a.gguf", "Q8_0", effort="fast")
    with pytest.raises(QuantError, match=r"converting needs .* of main memory"):
        convert(wan, tmp_path / "a.safetensors", "INT8")
    assert [file.name for file in tmp_path.iterdir()] == ["a.gguf"]


def test_a_rounding_for_outputs_counts_as_main_memory(wan, tmp_path, monkeypatch):
    limit = resources._ENCODING_BYTES + 512 * 256 * 16
    monkeypatch.setattr(resources, "free_memory", lambda: limit)
    ones = {name: torch.ones(tensor.shape[1]) for name, tensor in load_file(wan).items() if tensor.ndim == 2}
    convert(wan, tmp_path / "a.gguf", "Q8_0", importance=ones, effort="fast")
    convert(wan, tmp_path / "a.safetensors", "INT8", effort="fast")
    with pytest.raises(QuantError, match=r"converting needs 0\.88 GiB of main memory"):
        convert(wan, tmp_path / "b.safetensors", "INT8", importance=ones)


def test_the_settings_of_a_source_are_not_those_of_its_conversion(wan, tmp_path):
    """The source corrected its biases, and records that; this conversion did not."""
    ones = {name: torch.ones(tensor.shape[1]) for name, tensor in load_file(wan).items() if tensor.ndim == 2}
    importance = Importance(ones, dict.fromkeys(ones, 1.0), 1, totals={name: row / 2 for name, row in ones.items()})
    first = convert(wan, tmp_path / "a.safetensors", "W4A8", importance=importance)
    assert "wanquant.corrected_biases" in first.metadata
    second = convert(first.path, tmp_path / "b.safetensors", "INT8")
    assert "wanquant.corrected_biases" not in second.metadata
    assert convert(first.path, second.path, "INT8").reused


@pytest.mark.parametrize("marker", [b"[" * 4000, b"\xff", b'"text"', b"{}"])
def test_a_bad_marker_is_shown_as_it_is_stored(marker, wan, tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = load_file(convert(wan, path, "INT8", effort="fast").path)
    tensors[f"{LAYER}.comfy_quant"] = torch.tensor(list(marker), dtype=torch.uint8)
    save_file(tensors, path, {"wanquant.corrected_biases": "[" * 4000, "wanquant.relative_error": "xy"})
    shown = {tensor.name: tensor.qtype for tensor in inspect(path).tensors}
    assert shown[f"{LAYER}.weight"] == "I8"
    assert shown["blocks.0.ffn.2.weight"] == "INT8"
