"""Damaged headers of safetensors files are refused, with one line that names the file and the tensor."""

from __future__ import annotations

import json

import pytest

from wanquant.quant import QuantError
from wanquant.quant.files.safetensors_header import read_safetensors_header
from wanquant.quant.sources.checkpoint import open_checkpoint

HEAD = {"dtype": "F32", "shape": [1, 2, 2], "data_offsets": [0, 16]}


def write_raw(path, header, data=bytes(16)):
    """Write a safetensors file with any header, either bytes or a value that becomes JSON."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    return path


DEEP = b"[" * 1_000_000
TWICE = b'{"head.modulation": %b, "head.modulation": %b}' % (json.dumps(HEAD).encode(), json.dumps(HEAD).encode())


def test_a_header_length_that_looks_like_a_pickle_is_accepted(tmp_path):
    header = json.dumps({"head.modulation": HEAD}).encode().ljust(0x0280)  # bytes 80 02, as a pickle of protocol 2
    with open_checkpoint(write_raw(tmp_path / "a.safetensors", header)) as checkpoint:
        assert checkpoint.tensors["head.modulation"].shape == (1, 2, 2)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{ ", "header is not JSON"),
        (b"\xff\xfe", "header is not JSON"),
        pytest.param(DEEP, "header is not JSON", id="nested a million times"),
        pytest.param(TWICE, "occurs twice", id="duplicate name"),
        ([1], "header is a JSON list"),
        ({"__metadata__": {"a": 1}, "a": HEAD}, "__metadata__ is not a table of strings"),
        ({"a": 3}, "tensor a: malformed entry"),
        ({"a": HEAD | {"dtype": 4}}, "tensor a: malformed entry"),
        ({"a": HEAD | {"shape": [0, 4]}}, "tensor a: 16 bytes for F32"),
        ({"a": HEAD | {"shape": [-2, -2]}}, "tensor a: malformed entry"),
        ({"a": HEAD | {"shape": [2.0, 2]}}, "tensor a: malformed entry"),
        ({"a": HEAD | {"data_offsets": [-16, 0]}}, "tensor a: malformed entry"),
        ({"a": HEAD | {"data_offsets": [16, 0]}}, "tensor a: malformed entry"),
        ({"a": HEAD | {"shape": [2**62, 2**62]}}, "tensor a: 16 bytes for F32"),
        ({"a": HEAD | {"shape": [3]}}, "tensor a: 16 bytes for F32"),
        ({"a": HEAD | {"data_offsets": [2**63, 2**63 + 16]}}, "tensor a: starts at byte 9223372036854775"),
        ({"a": HEAD, "b": HEAD}, "tensor b: starts at byte"),
        ({"a": HEAD | {"shape": [2], "data_offsets": [8, 16]}}, "tensors neither overlap nor leave a gap"),
        ({"a": HEAD | {"shape": [8], "data_offsets": [0, 32]}}, "the end of the file; the file is cut off"),
        ({"a": HEAD | {"shape": [2], "data_offsets": [0, 8]}}, "the end of the file; the file is cut off"),
    ],
)
def test_damaged_headers_are_refused(tmp_path, header, message):
    path = write_raw(tmp_path / "a.safetensors", header)
    with pytest.raises(QuantError, match=message) as error:
        open_checkpoint(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\x10", b"\xff" * 8, bytes(8), (100_000_001).to_bytes(8, "little")])
def test_impossible_header_lengths_are_refused(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(QuantError, match=r"header length \d+ in a file of \d+ bytes"):
        open_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"<html>..", "a web page"),
        (b"<!DOCTYPE html><html><head><title>404</title>" + bytes(99), "a web page"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
            "a Git LFS pointer; run `git lfs pull`",
        ),
        (b'{\n  "_class_name": "WanPipeline"\n}', "JSON, such as a configuration; choose the file of the weights"),
        (b"{}", "JSON"),
    ],
)
@pytest.mark.parametrize("name", ["a.safetensors", "model_index.json", "config"])
def test_other_files_are_named(tmp_path, content, kind, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(QuantError, match=f"{name}: expected safetensors, got {kind}"):
        open_checkpoint(tmp_path / name)


def test_a_gguf_is_recognized(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"GGUF" + bytes(99))
    with pytest.raises(QuantError, match=r"a\.safetensors: a GGUF file, expected safetensors"):
        read_safetensors_header(tmp_path / "a.safetensors")
