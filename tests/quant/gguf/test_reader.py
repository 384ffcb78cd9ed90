"""GGUF files are mapped, not copied; split files open as one; changes of a file are noticed."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from wanquant.quant import QuantError, open_gguf
from wanquant.tests.quant.gguf_bytes import STRING, RawGGUF, RawTensor, name, pair

KINDS = ("Q4_0", "Q8_0", "F16", "F32")


def write_with_gguf(path: Path, **options: int) -> dict[str, np.ndarray]:
    """Write a (3, 64) tensor of each kind, and return the bytes of each."""
    writer = gguf.GGUFWriter(path, "wan", **options)
    rng, packed = np.random.default_rng(0), {}
    for kind in KINDS:
        qtype = gguf.GGMLQuantizationType[kind]
        packed[kind] = gguf.quants.quantize(rng.standard_normal((3, 64), np.float32), qtype)
        writer.add_tensor(kind, packed[kind], raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {kind: values.view(np.uint8) for kind, values in packed.items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_with_gguf(tmp_path / "model.gguf")
    return tmp_path / "model.gguf"


def test_tensors_written_by_the_gguf_package_are_read(tmp_path: Path):
    packed = write_with_gguf(tmp_path / "model.gguf")
    file = open_gguf(tmp_path / "model.gguf")
    assert tuple(file.tensors) == KINDS
    for kind, tensor in file.tensors.items():
        assert (tensor.name, tensor.qtype.name, tensor.shape) == (kind, kind, (3, 64))
        np.testing.assert_array_equal(tensor.data.numpy(), packed[kind])
        expected = gguf.quants.dequantize(
            packed[kind].view({"F16": "f2", "F32": "f4"}.get(kind, "u1")), gguf.GGMLQuantizationType[kind]
        )
        np.testing.assert_array_equal(tensor.dequantize().numpy(), expected)


def test_data_is_a_private_mapping_shared_by_all_tensors(path: Path):
    before = path.read_bytes()
    file = open_gguf(path)
    storages = {tensor.data.untyped_storage().data_ptr() for tensor in file.tensors.values()}
    assert len(storages) == 1
    file.tensors["Q8_0"].data.fill_(7)
    assert path.read_bytes() == before
    maps = Path("/proc/self/maps")
    if maps.exists():
        (line,) = (line for line in maps.read_text().splitlines() if line.endswith(str(path)))
        assert " rw-p " in line


@pytest.mark.skipif(os.name == "nt", reason="Windows does not delete a mapped file")
def test_mapping_outlives_the_file_object_and_the_name(path: Path):
    tensor = open_gguf(path).tensors["F32"]
    expected = tensor.dequantize()
    path.unlink()
    torch.testing.assert_close(tensor.dequantize(), expected, rtol=0, atol=0)


def test_unchanged(path: Path):
    open_gguf(path).check_unchanged()


def test_replaced_file_is_noticed(path: Path):
    file, expected = open_gguf(path), open_gguf(path).tensors["F32"].dequantize()
    other = path.with_name("other.gguf")
    other.write_bytes(bytes(path.stat().st_size))
    os.replace(other, path)
    with pytest.raises(QuantError, match="changed or replaced"):
        file.check_unchanged()
    torch.testing.assert_close(file.tensors["F32"].dequantize(), expected, rtol=0, atol=0)


def test_touched_or_deleted_file_is_noticed(path: Path):
    file = open_gguf(path)
    os.utime(path, ns=(1, 1))
    with pytest.raises(QuantError, match="changed or replaced"):
        file.check_unchanged()
    path.unlink()
    with pytest.raises(QuantError, match="No such file"):
        file.check_unchanged()


@pytest.mark.parametrize("first", [1, 3])
def test_split_file_opens_as_one_from_any_part(tmp_path: Path, first: int):
    packed = write_with_gguf(tmp_path / "model.gguf", split_max_tensors=1)
    file = open_gguf(tmp_path / f"model-{first:05d}-of-00004.gguf")
    assert tuple(file.tensors) == KINDS
    assert len(file.parts) == 4
    assert file.metadata["general.architecture"] == "wan"
    assert not any(key.startswith("split.") for key in file.metadata)
    for kind, tensor in file.tensors.items():
        assert tensor.path == file.parts[KINDS.index(kind)].path
        np.testing.assert_array_equal(tensor.data.numpy(), packed[kind])
    file.check_unchanged()


def test_missing_part_is_named(tmp_path: Path):
    write_with_gguf(tmp_path / "model.gguf", split_max_tensors=1)
    (tmp_path / "model-00003-of-00004.gguf").unlink()
    with pytest.raises(QuantError, match=r"model-00003-of-00004\.gguf: missing"):
        open_gguf(tmp_path / "model-00001-of-00004.gguf")


def split_part(number: int, **keys: int) -> bytes:
    pairs = [pair(f"split.{key.replace('_', '.')}", 5, struct.pack("<i", value)) for key, value in keys.items()]
    return RawGGUF(pairs=pairs, tensors=[RawTensor(f"w{number}")]).pack()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"no": 0, "count": 2}, "00002-of-00002.gguf: split.no: 0, expected 1"),
        ({"no": 1, "count": 3}, "split.count: 3, expected 2"),
        ({"no": 1, "count": 2, "tensors_count": 9}, "split.tensors.count: 9, expected 2"),
    ],
)
def test_parts_of_different_files_are_refused(tmp_path: Path, keys: dict[str, int], message: str):
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(split_part(0, no=0, count=2))
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(split_part(1, **keys))
    with pytest.raises(QuantError, match=message):
        open_gguf(tmp_path / "m-00001-of-00002.gguf")


def test_orig_shape_in_the_first_part_applies_to_the_others(tmp_path: Path):
    key = pair("comfy.gguf.orig_shape.w1", 9, struct.pack("<IQ3i", 5, 3, 4, 4, 4))
    first = RawGGUF(pairs=[key, pair("general.architecture", STRING, name("wan"))], tensors=[RawTensor("w0")])
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(first.pack())
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(split_part(1))
    tensors = open_gguf(tmp_path / "m-00002-of-00002.gguf").tensors
    assert (tensors["w0"].shape, tensors["w1"].shape) == ((2, 32), (4, 4, 4))
