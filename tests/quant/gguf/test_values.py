"""Metadata values of every type are read and written as by the gguf package; large arrays stay packed."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest

from wanquant.quant import QuantError
from wanquant.quant.gguf.header import read_header
from wanquant.quant.gguf.values import StringArray, pack_metadata
from wanquant.tests.counting import counted_calls
from wanquant.tests.quant.gguf_bytes import ARRAY, STRING, RawGGUF, array, name, pair


def write_with_gguf(path: Path, values: list[tuple[str, object, str, str | None]]) -> Path:
    writer = gguf.GGUFWriter(path, "wan")
    for key, value, kind, item_kind in values:
        sub_type = gguf.GGUFValueType[item_kind] if item_kind else None
        writer.add_key_value(key, value, gguf.GGUFValueType[kind], sub_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path


SCALARS = [
    ("UINT8", 255), ("INT8", -128), ("UINT16", 65535), ("INT16", -32768), ("UINT32", 2**32 - 1), ("INT32", -(2**31)),
    ("UINT64", 2**64 - 1), ("INT64", -(2**63)), ("FLOAT32", 0.5), ("FLOAT64", 0.1), ("BOOL", True), ("STRING", "Wän"),
]  # fmt: skip
NUMPY = {
    "UINT8": np.uint8, "INT8": np.int8, "UINT16": np.uint16, "INT16": np.int16, "UINT32": np.uint32, "INT32": np.int32,
    "UINT64": np.uint64, "INT64": np.int64, "FLOAT32": np.float32, "FLOAT64": np.float64, "BOOL": np.bool_,
}  # fmt: skip


def test_reads_every_type_of_the_gguf_package(tmp_path: Path):
    values = [(kind, value, kind, None) for kind, value in SCALARS]
    values += [(f"{kind}[]", [value, value], "ARRAY", kind) for kind, value in SCALARS]
    metadata = read_header(write_with_gguf(tmp_path / "values.gguf", values)).metadata
    for kind, value in SCALARS:
        assert metadata[kind] == value
        assert type(metadata[kind]) is type(value)
        assert list(metadata[f"{kind}[]"]) == [value, value]
    assert metadata["INT16[]"].dtype == np.int16
    assert not metadata["INT16[]"].flags.writeable


def test_nested_and_empty_arrays_are_read(tmp_path: Path):
    inner = array(5, 2, np.array([1, 2], "<i4").tobytes()) + array(STRING, 1, name("x")) + array(6, 0)
    path = tmp_path / "nested.gguf"
    path.write_bytes(RawGGUF().with_pairs(pair("nested", ARRAY, array(ARRAY, 3, inner))).pack())
    numbers, strings, empty = read_header(path).metadata["nested"]
    assert (numbers.tolist(), list(strings), empty.tolist()) == ([1, 2], ["x"], [])


@pytest.mark.parametrize("kind", NUMPY)
def test_numbers_are_written_with_their_numpy_dtype(tmp_path: Path, kind: str):
    value = NUMPY[kind](dict(SCALARS)[kind])
    scalar, several = read_back(tmp_path, {"one": value, "two": np.array([value, value])})
    assert (scalar.types, scalar.contents()) == ([gguf.GGUFValueType[kind]], value)
    assert several.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType[kind]]
    assert several.contents() == [value, value]


@pytest.mark.parametrize(
    ("value", "types"),
    [
        ("text", ["STRING"]),
        ("", ["STRING"]),
        (True, ["BOOL"]),
        (15, ["UINT32"]),
        (0.5, ["FLOAT32"]),
        (b"\0\xff", ["ARRAY", "UINT8"]),
        (["a", "ä"], ["ARRAY", "STRING"]),
    ],
)
def test_python_values_are_written_with_a_fixed_type(tmp_path: Path, value: object, types: list[str]):
    (field,) = read_back(tmp_path, {"key": value})
    assert [kind.name for kind in field.types] == types
    assert field.contents() == (list(value) if isinstance(value, bytes) else value)


def read_back(tmp_path: Path, metadata: dict[str, object]) -> list[gguf.ReaderField]:
    path = tmp_path / "ours.gguf"
    path.write_bytes(RawGGUF(pairs=[pack_metadata(metadata)], n_pairs=len(metadata)).pack())
    reader = gguf.GGUFReader(path)
    return [reader.fields[key] for key in metadata]


@pytest.mark.parametrize(
    "value", [-1, 1 << 32, [1, 2], None, np.float16(1), np.zeros((2, 2), np.float32), {"a": 1}, ["a", 1], "\ud800"]
)
def test_ambiguous_or_unknown_values_are_refused(value: object):
    with pytest.raises(QuantError):
        pack_metadata({"key": value})


def test_string_array_is_a_sequence():
    strings = StringArray(b"".join(map(name, ("a", "", "万"))), 3, "label")
    assert list(strings) == ["a", "", "万"]
    assert strings[-1] == "万"
    assert strings[:2] == ["a", ""]
    assert "万" in strings
    with pytest.raises(IndexError):
        strings[3]
    with pytest.raises(QuantError, match="label: not valid UTF-8"):
        StringArray(name(b"\xff"), 1, "label")[0]


def test_a_vocabulary_is_read_with_one_call_per_string(tmp_path: Path):
    tokens = [f"token {number}" for number in range(1 << 18)]
    path = write_with_gguf(
        tmp_path / "vocabulary.gguf",
        [(key, tokens, "ARRAY", "STRING") for key in ("tokens", "merges")]
        + [("types", [1] * len(tokens), "ARRAY", "INT32")],
    )
    with counted_calls() as calls:
        header = read_header(path)
    assert calls.count < 2 * len(tokens) + 2000
    assert header.metadata["tokens"][-1] == tokens[-1]

    tracemalloc.start()
    header = read_header(path)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 1.2 * path.stat().st_size
    assert peak < 4 * path.stat().st_size
