"""Files of importance matrices against the gguf package, and against hand-written files of the legacy layout."""

from __future__ import annotations

import dataclasses
import struct

import gguf
import numpy as np
import pytest
import torch

from wanquant.quant import QuantError
from wanquant.quant.statistics.importance import Collector, Importance
from wanquant.quant.statistics.importance_file import read_importance, write_importance
from wanquant.tests.counting import counted_calls

A, B = "blocks.0.ffn.0.weight", "blocks.0.ffn.2.weight"


@pytest.fixture
def importance():
    return Importance({B: torch.rand(96), A: torch.rand(64)}, {B: 40.0, A: 30.0}, 5, datasets=("a ball", "a cube"))


def as_llama_cpp_writes(path, tensors):
    """Write rows of floats by tensor name, as llama-imatrix does."""
    writer = gguf.GGUFWriter(path, "", use_temp_file=False)
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["wiki.train.raw"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, rows in tensors.items():
        writer.add_tensor(name, np.array(rows, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_legacy(*entries, tail=b"\5\0\0\0\4\0\0\0wiki"):
    packed = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        packed += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values))
        packed += np.array(values, "<f4").tobytes()
    return packed + tail


def test_round_trip(tmp_path, importance):
    read = read_importance(write_importance(tmp_path / "a.gguf", importance))
    assert list(read) == [A, B]
    assert all(torch.equal(read.sums[name], importance.sums[name]) for name in (A, B))
    assert read.counts == importance.counts
    assert (read.samples, read.datasets, read.name) == (5, ("a ball", "a cube"), "a.gguf")
    torch.testing.assert_close(read[A], importance.sums[A] / 30)


def test_means_are_kept(tmp_path):
    collector = Collector()
    inputs = torch.randn(30, 8) + 1
    collector.add(A, inputs)
    collected = collector.result()
    read = read_importance(write_importance(tmp_path / "a.gguf", collected))
    torch.testing.assert_close(read.mean(A), inputs.mean(0))
    torch.testing.assert_close(read[A], inputs.square().mean(0))
    totals = {A: collected.sums[A] * 30}
    broken = write_importance(tmp_path / "b.gguf", dataclasses.replace(collected, totals=totals))
    with pytest.raises(QuantError, match=f"tensor {A}: its sums of inputs do not fit"):
        read_importance(broken)


def test_layout_is_that_of_llama_cpp(tmp_path, importance):
    reader = gguf.GGUFReader(write_importance(tmp_path / "a.gguf", importance))
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["a ball", "a cube"]
    assert reader.fields["imatrix.chunk_count"].types == [gguf.GGUFValueType.UINT32]
    assert reader.fields["imatrix.chunk_count"].contents() == 5
    assert reader.fields["imatrix.chunk_size"].contents() == 8
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert list(tensors) == [f"{A}.in_sum2", f"{A}.counts", f"{B}.in_sum2", f"{B}.counts"]
    assert tensors[f"{A}.in_sum2"].shape.tolist() == [64, 1]
    assert tensors[f"{A}.counts"].shape.tolist() == [1, 1]
    assert {tensor.tensor_type for tensor in tensors.values()} == {gguf.GGMLQuantizationType.F32}
    assert np.array_equal(tensors[f"{B}.in_sum2"].data.ravel(), importance.sums[B].numpy())


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_files_of_llama_cpp_and_stable_diffusion_cpp_are_read(tmp_path, prefix):
    rows = {f"{prefix}{A}.in_sum2": [[2.0, 4.0, 6.0]], f"{prefix}{A}.counts": [[2.0]]}
    read = read_importance(as_llama_cpp_writes(tmp_path / "a.gguf", rows))
    assert read[A].tolist() == [1, 2, 3]
    assert read.samples == 3
    (tmp_path / "a.dat").write_bytes(as_legacy((prefix + A, 2, [2.0, 4.0, 6.0]), (prefix + B, 1, [5.0])))
    legacy = read_importance(tmp_path / "a.dat")
    assert legacy[A].tolist() == [1, 2, 3] and legacy[B].tolist() == [5]
    assert legacy.samples == 2


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ({f"{A}.in_sum2": [[1.0, 2.0]], f"{A}.counts": [[0.0]]}, "its count is 0"),
        ({f"{A}.in_sum2": [[1.0, np.nan]], f"{A}.counts": [[1.0]]}, "holds NaN"),
        ({f"{A}.in_sum2": [[1.0, -2.0]], f"{A}.counts": [[1.0]]}, "holds .* negative"),
        ({f"{A}.in_sum2": [[1.0, 2.0]], f"{A}.counts": [[np.nan]]}, "its count is nan"),
        ({f"{A}.in_sum2": [[1.0, 2.0]], f"{A}.counts": [[np.inf]]}, "its count is inf"),
        ({f"{A}.in_sum2": [[1.0, 2.0]]}, "one row of sums and one count"),
        ({f"{A}.counts": [[1.0]], f"{B}.in_sum2": [[1.0]], f"{B}.counts": [[1.0]]}, "one row of sums and one count"),
        ({f"{A}.in_sum2": [[1.0], [2.0]], f"{A}.counts": [[1.0], [1.0]]}, "one row of sums and one count"),
        ({A: [[1.0]]}, "not an importance matrix"),
    ],
    ids=[
        "zero count",
        "nan",
        "negative",
        "nan count",
        "infinite count",
        "no count",
        "no sums",
        "experts",
        "other file",
    ],
)
def test_malformed_files_are_refused(tmp_path, rows, problem):
    path = as_llama_cpp_writes(tmp_path / "a.gguf", rows)
    with pytest.raises(QuantError, match=problem) as error:
        read_importance(path)
    assert str(path) in str(error.value) and (A in str(error.value) or A in rows)


WHOLE = as_legacy((A, 2, [2.0, 4.0]), (B, 1, [5.0]))


@pytest.mark.parametrize(
    "content",
    [b"", b"\1", WHOLE[:40], WHOLE[:-24], b"\xff" * 100, as_legacy(), as_legacy(("", 1, [1.0])), b"x" * 5000],
    ids=["empty", "one byte", "cut in values", "cut in an entry", "negative", "no entries", "no name", "text"],
)
def test_damaged_legacy_files_are_refused(tmp_path, content):
    (tmp_path / "a.dat").write_bytes(content)
    with pytest.raises(QuantError, match=r"a\.dat: (neither a GGUF|not an importance matrix)"):
        read_importance(tmp_path / "a.dat")


def test_legacy_entry_that_never_ran_is_refused(tmp_path):
    (tmp_path / "a.dat").write_bytes(as_legacy((A, 0, [2.0, 4.0])))
    with pytest.raises(QuantError, match="its count is 0"):
        read_importance(tmp_path / "a.dat")


def test_more_legacy_entries_than_a_model_has_layers(tmp_path):
    many = as_legacy(*((f"{number:x}", 1, [1.0]) for number in range(20_000)))
    (tmp_path / "a.dat").write_bytes(many)
    with counted_calls() as calls, pytest.raises(QuantError, match="20000 entries, expected at most 16384"):
        read_importance(tmp_path / "a.dat")
    assert calls.count < 1000


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(QuantError, match="no such file"):
        read_importance(tmp_path / "none.gguf")
