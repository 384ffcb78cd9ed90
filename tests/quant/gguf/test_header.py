"""Bad GGUF files are refused with one line that names the file and the field, and without much work."""

from __future__ import annotations

import json
import os
import random
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from wanquant.quant import QuantError
from wanquant.quant.gguf.header import ORIG_SHAPE_KEY, read_header
from wanquant.quant.gguf.reader import open_gguf
from wanquant.tests.counting import counted_calls
from wanquant.tests.quant.gguf_bytes import ARRAY, STRING, U8, U32, RawGGUF, RawTensor, array, name, pair

HUGE = 1 << 63
GOOD = RawGGUF()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def orig_shape(*dims: int, item_type: int = 5) -> bytes:
    return pair(ORIG_SHAPE_KEY + "w", ARRAY, array(item_type, len(dims), struct.pack(f"<{len(dims)}i", *dims)))


BAD = {
    "empty": (b"", "magic: .*empty file"),
    "wrong magic": (RawGGUF(magic=b"GGUG").pack(), "magic: .*b'GGUG'"),
    "web page": (b"<!DOCTYPE html><html><head><title>404</title>" + bytes(99), "magic: .*web page"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "magic: .*Git LFS"),
    "safetensors": (struct.pack("<Q", 66) + json.dumps({"w": {}}).encode().ljust(66), "magic: .*safetensors"),
    "pickle": (b"PK\x03\x04" + bytes(60), "magic: .*PyTorch"),
    "old ggml": (b"tjgg" + bytes(60), "magic: .*before GGUF"),
    "version 1": (RawGGUF(version=1).pack(), "version: 1, expected 2 or 3"),
    "version 0": (RawGGUF(version=0).pack(), "version: 0, expected 2 or 3"),
    "big-endian": (RawGGUF(version=3 << 24).pack(), "version: a big-endian"),
    "tensor count": (RawGGUF(n_tensors=HUGE).pack(), f"tensor count: {HUGE}"),
    "metadata count": (RawGGUF(n_pairs=HUGE).pack(), f"metadata count: {HUGE}"),
    "one tensor too many": (RawGGUF(n_tensors=3).pack(), "tensor 2"),
    "key length": (RawGGUF(pairs=[struct.pack("<Q", HUGE)]).pack(), f"metadata key 0: {HUGE} bytes"),
    "key not utf-8": (RawGGUF(pairs=[pair(b"\xff\xfe", U8, b"\0")]).pack(), "metadata key 0: not valid UTF-8"),
    "string length": (RawGGUF(pairs=[pair("k", STRING, struct.pack("<Q", HUGE))]).pack(), "k: .* of the header"),
    "string not utf-8": (RawGGUF(pairs=[pair("k", STRING, name(b"\xff"))]).pack(), "k: not valid UTF-8"),
    "value type": (RawGGUF(pairs=[pair("k", 13, bytes(8))]).pack(), "k: metadata value type 13"),
    "array item type": (RawGGUF(pairs=[pair("k", ARRAY, array(77, 1))]).pack(), "k: metadata value type 77"),
    "array of numbers": (RawGGUF(pairs=[pair("k", ARRAY, array(U32, HUGE))]).pack(), "k: ends at byte"),
    "array of strings": (RawGGUF(pairs=[pair("k", ARRAY, array(STRING, HUGE))]).pack(), f"k: {HUGE} items"),
    "array of arrays": (RawGGUF(pairs=[pair("k", ARRAY, array(ARRAY, HUGE))]).pack(), f"k: {HUGE} items"),
    "deep arrays": (RawGGUF(pairs=[pair("k", ARRAY, array(ARRAY, 1) * 1000)]).pack(), "k: arrays nested deeper"),
    "duplicate key": (GOOD.with_pairs(pair("tokens", U8, b"\0")).pack(), "tokens: .*twice"),
    "alignment 0": (GOOD.with_pairs(pair("general.alignment", U32, bytes(4))).pack(), "general.alignment: 0"),
    "alignment 48": (
        GOOD.with_pairs(pair("general.alignment", U32, struct.pack("<I", 48))).pack(),
        "general.alignment: 48, expected a power of two",
    ),
    "alignment huge": (
        GOOD.with_pairs(pair("general.alignment", U32, struct.pack("<I", 1 << 31))).pack(),
        "general.alignment",
    ),
    "alignment text": (
        GOOD.with_pairs(pair("general.alignment", STRING, name("x"))).pack(),
        "general.alignment: 'x'",
    ),
    "name not utf-8": (GOOD.with_tensor(name=b"\xc3").pack(), "name of tensor 0: not valid UTF-8"),
    "name unprintable": (GOOD.with_tensor(name="w\n\x1b[31m").pack(), "name of tensor 0: 'w.*unprintable"),
    "key empty": (RawGGUF(pairs=[pair("", U8, b"\0")]).pack(), "metadata key 0: 0 bytes"),
    "duplicate tensor": (GOOD.with_tensor(name="b").pack(), "tensor b: appears twice"),
    "unknown type": (GOOD.with_tensor(type_id=99).pack(), "tensor w: .*99 .*Q8_0"),
    "dimensions": (GOOD.with_tensor(dims=(1,) * 6).pack(), "tensor w: 6 dimensions"),
    "dimension count": (
        RawGGUF(tensors=[], n_tensors=1, data=name("w") + b"\xff" * 64).pack(),
        "tensor w: 4294967295 dimensions|tensor",
    ),
    "size 0": (GOOD.with_tensor(dims=(32, 0)).pack(), r"tensor w: shape \(0, 32\)"),
    "overflow": (GOOD.with_tensor(dims=(1 << 62, 1 << 62, 4)).pack(), "tensor w: .*past the end"),
    "row": (GOOD.with_tensor(dims=(33, 2)).pack(), "tensor w: .*block size 32"),
    "past the end": (GOOD.with_tensor(dims=(32, 99)).pack(), "tensor w: .*past the end"),
    "offset": (GOOD.with_tensor(offset=HUGE).pack(), "tensor w: .*past the end"),
    "misaligned": (GOOD.with_tensor(offset=8).pack(), "tensor w: offset .*expected a multiple"),
    "overlap": (GOOD.with_tensor(offset=64, dims=(32, 1)).pack(), "tensor b: its data overlaps that of w"),
    "orig_shape product": (GOOD.with_pairs(orig_shape(3, 7)).pack(), "orig_shape.w: .*3, 7"),
    "orig_shape negative": (GOOD.with_pairs(orig_shape(-2, -32)).pack(), "orig_shape.w: "),
    "orig_shape floats": (GOOD.with_pairs(orig_shape(2, 32, item_type=6)).pack(), "orig_shape.w: expected"),
    "orig_shape text": (GOOD.with_pairs(pair(ORIG_SHAPE_KEY + "w", STRING, name("2"))).pack(), "orig_shape.w: "),
    "unnamed split": (GOOD.with_pairs(pair("split.count", 2, b"\3\0")).pack(), "split.count: 3, expected 1"),
    "split text": (GOOD.with_pairs(pair("split.count", STRING, name("1"))).pack(), "split.count: "),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_bad_file_is_refused_in_one_line_without_allocating(tmp_path: Path, content: bytes, message: str):
    path = write(tmp_path / "bad.gguf", content)
    tracemalloc.start()
    try:
        with counted_calls() as calls, pytest.raises(QuantError, match=message) as error:
            read_header(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert peak < 1 << 20
    assert calls.count < 2000


@pytest.mark.parametrize(
    ("payload", "message", "strings"),
    [
        (pair("k", STRING, struct.pack("<Q", 1 << 33)), "k: .* of the header", 0),
        (pair("k", ARRAY, array(U8, 1 << 33)), "k: .* of the header", 0),
        (pair("k", ARRAY, array(STRING, 1 << 30)), "k: .* items", 0),
        (pair("k", ARRAY, array(STRING, 1 << 20)), "metadata key 1: 0 bytes", 1 << 20),
    ],
    ids=["string", "numbers", "strings", "empty strings"],
)
def test_numbers_that_only_a_large_file_could_hold_are_refused_without_reading_it(
    tmp_path: Path, payload: bytes, message: str, strings: int
):
    path = write(tmp_path / "large.gguf", RawGGUF(pairs=[payload], n_pairs=2, tensors=(), data=b"").pack())
    with path.open("r+b") as file:
        file.truncate(1 << 34)
    with counted_calls() as calls, pytest.raises(QuantError, match=message):
        read_header(path)
    assert calls.count < strings + 2000


def test_a_file_truncated_anywhere_is_refused(tmp_path: Path):
    content = GOOD.pack()
    assert set(read_header(write(tmp_path / "whole.gguf", content)).tensors) == {"w", "b"}
    for size in range(len(content)):
        with pytest.raises(QuantError):
            read_header(write(tmp_path / "cut.gguf", content[:size]))


@pytest.mark.parametrize("seed", range(4))
def test_mutations_are_refused_or_read(tmp_path: Path, seed: int):
    rng, content, path = random.Random(seed), GOOD.with_pairs(orig_shape(32, 2)).pack(), tmp_path / "fuzz.gguf"
    n_read = 0
    tracemalloc.start()
    for _ in range(500):
        mutated = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            mutated[rng.randrange(len(mutated))] = rng.choice((0, 1, 9, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        if rng.random() < 0.2:
            del mutated[rng.randrange(len(mutated)) :]
        write(path, bytes(mutated))
        try:
            file = open_gguf(path)
            for tensor in file.tensors.values():
                tensor.dequantize()
            for value in file.metadata.values():
                list(value) if hasattr(value, "__len__") else value
            n_read += 1
        except QuantError as error:
            assert "\n" not in str(error)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert n_read > 50
    assert peak < 4 << 20


def test_a_path_that_is_not_a_file_is_refused(tmp_path: Path):
    with pytest.raises(QuantError, match="expected a file"):
        read_header(tmp_path)
    with pytest.raises(QuantError, match="No such file"):
        read_header(tmp_path / "missing.gguf")
    if not hasattr(os, "mkfifo"):
        return
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(QuantError, match="expected a file"):
        read_header(tmp_path / "pipe.gguf")


def test_a_file_without_read_permission_is_refused(tmp_path: Path):
    path = write(tmp_path / "secret.gguf", GOOD.pack())
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user reads everything")
    with pytest.raises(QuantError, match="Permission denied"):
        read_header(path)


@pytest.mark.parametrize("version", [2, 3])
def test_a_good_file_is_read(tmp_path: Path, version: int):
    header = read_header(write(tmp_path / "good.gguf", RawGGUF(version=version).pack()))
    assert header.metadata["general.architecture"] == "wan"
    assert list(header.metadata["tokens"]) == ["a", "bc"]
    np.testing.assert_array_equal(header.metadata["scores"], np.array([1, 2], np.float32))
    weight = header.tensors["w"]
    assert (weight.qtype.name, weight.shape, weight.nbytes) == ("Q8_0", (2, 32), 68)


@pytest.mark.parametrize("alignment", [1, 64, 4096])
def test_tensor_data_begins_at_a_multiple_of_the_alignment(tmp_path: Path, alignment: int):
    pairs = [pair("general.alignment", U32, struct.pack("<I", alignment))]
    head = RawGGUF(pairs=pairs, tensors=[RawTensor("w", (4,), 0)], data=b"").pack().rstrip(b"\0")
    n_header = len(RawGGUF(pairs=pairs, tensors=[RawTensor("w", (4,), 0)]).pack()) - len(GOOD.data)
    unpadded = 24 + len(pairs[0]) + len(RawTensor("w", (4,), 0).pack())
    assert len(head) <= unpadded <= n_header
    start = -(-unpadded // alignment) * alignment
    content = head.ljust(start, b"\0") + struct.pack("<4f", 1, 2, 3, 4)
    tensor = open_gguf(write(tmp_path / "aligned.gguf", content)).tensors["w"]
    assert tensor.offset == start
    assert tensor.dequantize().tolist() == [1, 2, 3, 4]


def test_orig_shape_restores_more_than_four_dimensions(tmp_path: Path):
    path = write(tmp_path / "flat.gguf", GOOD.with_pairs(orig_shape(4, 2, 2, 2, 2)).pack())
    record = read_header(path).tensors["w"]
    assert (record.shape, record.stored_shape) == ((4, 2, 2, 2, 2), (2, 32))
    assert open_gguf(path).tensors["w"].dequantize().shape == (4, 2, 2, 2, 2)


def test_five_stored_dimensions_are_read(tmp_path: Path):
    raw = RawGGUF(
        tensors=[RawTensor("patch_embedding.weight", (2, 2, 1, 3, 2), 0)], data=np.arange(24.0, dtype="f4").tobytes()
    )
    tensor = open_gguf(write(tmp_path / "5d.gguf", raw.pack())).tensors["patch_embedding.weight"]
    assert tensor.shape == tensor.stored_shape == (2, 3, 1, 2, 2)
    assert tensor.dequantize().flatten().tolist() == list(range(24))
