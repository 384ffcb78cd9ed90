"""Existing destinations: the result of the same conversion is reused, others are only replaced on request."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from wanquant.quant import QTYPES, QuantError, open_gguf
from wanquant.quant.conversion import output
from wanquant.quant.conversion.convert import convert
from wanquant.quant.files.atomic_file import AtomicFile
from wanquant.quant.files.journal import Journal
from wanquant.quant.gguf.header import read_header
from wanquant.quant.gguf.layout import TensorSpec
from wanquant.quant.gguf.provenance import encoder_revisions
from wanquant.quant.gguf.writer import GGUFWriter
from wanquant.quant.inspection.verify import verify
from wanquant.quant.sources import opening

FFN = "blocks.0.ffn.0.weight"


def test_result_of_the_same_conversion_is_reused(tmp_path, source):
    first = convert(source, tmp_path / "a.gguf", "Q8_0", effort="fast")
    written = first.destination.stat()
    again = convert(source, tmp_path / "a.gguf", "q8_0", effort="fast", overwrite=True)
    assert not first.reused and again.reused
    assert again.tensors == first.tensors
    assert again.destination.stat() == written


@pytest.mark.parametrize(
    "key", ["recipe", "calibrated", "allow_non_finite", "calibration_sha256", "source_mtime_ns", "data_sha256"]
)
def test_an_array_in_place_of_a_value_is_taken_for_another_value(tmp_path, source, key):
    file = open_gguf(convert(source, tmp_path / "a.gguf", "Q8_0", effort="fast").path)
    metadata = {k: np.int64(v) if type(v) is int else v for k, v in file.metadata.items() if "orig_shape" not in k}
    metadata[f"wanquant.{key}"] = np.zeros(3, np.float32)
    specs = [TensorSpec(name, tensor.qtype, tensor.shape) for name, tensor in file.tensors.items()]
    with GGUFWriter(tmp_path / "b.gguf", metadata, specs) as writer:
        for name, tensor in file.tensors.items():
            writer.write(name, tensor.data)
    verify(tmp_path / "b.gguf", source)
    if key in ("source_mtime_ns", "data_sha256"):  # the source's SHA-256 is that of the same content
        assert convert(source, tmp_path / "b.gguf", "Q8_0", effort="fast").reused
    else:
        with pytest.raises(QuantError, match="is not this conversion"):
            convert(source, tmp_path / "b.gguf", "Q8_0", effort="fast")


@pytest.fixture
def new_encoder(monkeypatch):
    """Return a function that makes the encoder of Q8_0 a newer one."""

    def raise_revision():
        newer = replace(QTYPES["Q8_0"], revision=QTYPES["Q8_0"].revision + 1)
        monkeypatch.setitem(QTYPES, "Q8_0", newer)

    return raise_revision


def test_file_of_an_older_encoder_is_used_until_it_is_to_be_made_anew(tmp_path, source, new_encoder, caplog):
    path = tmp_path / "a.gguf"
    old = convert(source, path, "Q8_0", effort="fast").path.read_bytes()
    other = convert(source, tmp_path / "b.gguf", "BF16", effort="fast")
    new_encoder()
    report = convert(source, path, "Q8_0", effort="fast")
    sentence = "a.gguf is used as it is: it was made by an older encoder of Q8_0; turn overwrite on to make it anew"
    assert report.reused and report.warnings == (sentence,) and path.read_bytes() == old
    assert sentence in report.text() and sentence in caplog.text
    assert convert(source, other.path, "BF16", effort="fast").warnings == (), "it holds no Q8_0"

    caplog.clear()
    report = convert(source, path, "Q8_0", effort="fast", overwrite=True)
    assert not report.reused and report.warnings == () and "older" not in caplog.text
    assert encoder_revisions(read_header(path).metadata)["Q8_0"] == QTYPES["Q8_0"].revision
    assert convert(source, path, "Q8_0", effort="fast", overwrite=True).reused


def test_file_of_a_newer_encoder_or_pack_is_used(tmp_path, source, new_encoder, monkeypatch):
    with monkeypatch.context() as newer:
        newer.setattr(output, "VERSION", "9.9.9")
        newer.setitem(QTYPES, "Q8_0", replace(QTYPES["Q8_0"], revision=7))
        convert(source, tmp_path / "a.gguf", "Q8_0", effort="fast")
    report = convert(source, tmp_path / "a.gguf", "Q8_0", effort="fast")
    assert report.reused and report.warnings == ()


def test_a_killed_conversion_does_not_continue_with_another_encoder(tmp_path, source, new_encoder, caplog, monkeypatch):
    arguments = {"source": source, "destination": tmp_path / "a.gguf", "recipe": "Q8_0", "effort": "fast"}
    leave_unfinished(arguments, monkeypatch)
    new_encoder()
    convert(**arguments)
    assert "starting anew" in caplog.text and "resumed after" not in caplog.text


def test_touched_source_is_recognized_by_its_content(tmp_path, source):
    copy = shutil.copy(source, tmp_path / "copy.safetensors")
    convert(copy, tmp_path / "a.gguf", "Q8_0", effort="fast")
    os.utime(copy, (1, 1))
    assert convert(copy, tmp_path / "a.gguf", "Q8_0", effort="fast").reused
    with open(copy, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x3f")
    with pytest.raises(QuantError, match="exists, but is not this conversion"):
        convert(copy, tmp_path / "a.gguf", "Q8_0", effort="fast")


def test_other_files_are_only_replaced_on_request(tmp_path, source):
    destination = tmp_path / "a.gguf"
    destination.write_text("precious")
    with pytest.raises(QuantError, match=r"a\.gguf: exists, but is not this conversion"):
        convert(source, destination, "Q8_0", effort="fast")
    assert destination.read_text() == "precious"
    convert(source, destination, "Q8_0", effort="fast", overwrite=True)
    for change in ({"recipe": "Q4_0"}, {"effort": "best"}, {"importance": {FFN: torch.ones(256)}}):
        with pytest.raises(QuantError, match="exists, but is not this conversion"):
            convert(source, destination, **({"recipe": "Q8_0", "effort": "fast"} | change))


def split(path, state, names, number):
    """Write some tensors as a file of their own, or as one of the two parts of a split GGUF."""
    if path.suffix == ".safetensors":
        save_file({name: state[name] for name in names}, path)
        return
    specs = [TensorSpec(name, QTYPES["BF16"], tuple(state[name].shape)) for name in names]
    metadata = {"split.no": number, "split.count": 2, "split.tensors.count": len(state)}
    with GGUFWriter(path, {"general.architecture": "wan"} | metadata, specs, overwrite=True) as writer:
        for spec in specs:
            writer.write(spec.name, state[spec.name].contiguous().view(torch.uint8).flatten())


def two_parts(folder, state, kind):
    """Return the arguments of a conversion from two files, and a function that replaces the first with other values."""
    names = [FFN, *sorted(state.keys() - {FFN})]
    add_on = {"ref_conv.weight": torch.ones(256, 16, 2, 2).bfloat16(), "ref_conv.bias": torch.ones(256).bfloat16()}
    if kind == "add-on":
        paths = [folder / "base.safetensors", folder / "add-on.safetensors"]
        parts = [state, add_on]
    else:
        paths = [folder / f"wan-0000{number}-of-00002.{kind}" for number in (1, 2)]
        parts = [{n: state[n] for n in names[::2]}, {n: state[n] for n in names[1::2]}]
    for number, (path, part) in enumerate(zip(paths, parts, strict=True)):
        split(path, state | add_on if kind == "add-on" else state, list(part), number)
    os.utime(paths[0], ns=(10**18, 10**18))
    size = paths[0].stat().st_size

    def replace_first():
        other = state | {FFN: state[FFN].flip(0)}
        split(paths[0], other, list(parts[0]), 0)
        os.utime(paths[0], ns=(10**18 - 1, 10**18 - 1))
        assert paths[0].stat().st_size == size

    return {"source": paths[0], "modules": paths[1:] if kind == "add-on" else ()}, replace_first


KINDS = ["safetensors", "gguf", "add-on"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_of_a_source_is_compared(tmp_path, state, kind):
    arguments, replace_first = two_parts(tmp_path, state, kind)
    settings = {"recipe": "Q8_0", "effort": "fast"}
    first = convert(destination=tmp_path / "a.gguf", **arguments, **settings)
    assert convert(destination=tmp_path / "a.gguf", **arguments, **settings).reused
    replace_first()
    with pytest.raises(QuantError, match="exists, but is not this conversion"):
        convert(destination=tmp_path / "a.gguf", **arguments, **settings)
    again = convert(destination=tmp_path / "a.gguf", **arguments, **settings, overwrite=True)
    assert again.metadata["wanquant.data_sha256"] != first.metadata["wanquant.data_sha256"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_is_compared_by_its_content_if_only_its_time_differs(tmp_path, state, kind):
    arguments, _ = two_parts(tmp_path, state, kind)
    convert(destination=tmp_path / "a.gguf", **arguments, recipe="Q8_0", effort="fast")
    os.utime(arguments["source"], (1, 1))
    assert convert(destination=tmp_path / "a.gguf", **arguments, recipe="Q8_0", effort="fast").reused


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_conversion_does_not_continue_with_another_part(tmp_path, state, kind, caplog, monkeypatch):
    arguments, replace_first = two_parts(tmp_path, state, kind)
    settings = {"recipe": "Q8_0", "effort": "fast"}
    leave_unfinished({**arguments, **settings, "destination": tmp_path / "a.gguf"}, monkeypatch)
    replace_first()
    resumed = convert(destination=tmp_path / "a.gguf", **arguments, **settings)
    assert "starting anew" in caplog.text and "resumed after" not in caplog.text
    whole = convert(destination=tmp_path / "b.gguf", **arguments, **settings)
    assert resumed.path.read_bytes() == whole.path.read_bytes()


def leave_unfinished(arguments, monkeypatch):
    """Leave what a killed conversion leaves: neither the file nor its journal is deleted."""
    with monkeypatch.context() as patch:
        patch.setattr(AtomicFile, "__exit__", lambda self, *_: self._file.close())
        patch.setattr(Journal, "delete", lambda _: None)
        with pytest.raises(KeyboardInterrupt):
            convert(**arguments, progress=stop_after(20, []))
    path = arguments["destination"]
    assert len(Journal(path.with_name(f".{path.name}.journal")).read()) > 10


def stop_after(n_tensors, seen):
    def progress(_done, _total, name):
        seen.append(name)
        if len(set(seen)) > n_tensors:
            raise KeyboardInterrupt

    return progress


def test_a_source_of_one_file_is_recorded_as_before(source, tmp_path):
    assert "wanquant.source_parts" not in convert(source, tmp_path / "a.gguf", "Q8_0", effort="fast").metadata


@pytest.mark.parametrize("suffix", ["safetensors", "gguf"])
def test_a_source_that_is_replaced_while_it_is_opened_is_refused(tmp_path, state, suffix, monkeypatch):
    """Its header describes a file that is no longer there."""
    path, other = tmp_path / f"a.{suffix}", tmp_path / f"other.{suffix}"
    for file in (path, other):
        split(file, state, sorted(state), 0) if suffix == "safetensors" else convert_to_bf16(state, file)
    module = opening
    name = "read_safetensors_header" if suffix == "safetensors" else "read_header"
    read = getattr(module, name)

    def read_then_replace(given):
        header = read(given)
        os.replace(other, path)
        return header

    monkeypatch.setattr(module, name, read_then_replace)
    with pytest.raises(QuantError, match="the file was changed or replaced"):
        convert(path, tmp_path / "b.gguf", "Q8_0", effort="fast")
    assert not (tmp_path / "b.gguf").exists()


def convert_to_bf16(state, path):
    save_file(state, path.with_suffix(".safetensors"))
    convert(path.with_suffix(".safetensors"), path, "BF16")
