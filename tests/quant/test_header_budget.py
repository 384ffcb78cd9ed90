"""Headers that would take gigabytes or seconds are refused first; the largest real ones are read."""

from __future__ import annotations

import json
import struct
import tracemalloc

import numpy as np
import pytest

from wanquant.quant import QuantError
from wanquant.quant.files.strict_json import MAX_VALUES, parse_json
from wanquant.quant.gguf.header import read_header
from wanquant.quant.gguf.values import pack_metadata
from wanquant.quant.sources.checkpoint import open_checkpoint
from wanquant.tests.counting import counted_calls
from wanquant.tests.quant.gguf_bytes import ARRAY, STRING, U8, RawGGUF, array, name, pair

MANY = 1 << 18
STRINGS = array(STRING, 1 << 19, bytes(8 << 19))
NESTED = array(ARRAY, 9000) + array(U8, 0) * 9000


def gguf(pairs=(), n_pairs=None, n_tensors=0, end=0):
    head = struct.pack("<4sIQQ", b"GGUF", 3, n_tensors, len(pairs) if n_pairs is None else n_pairs)
    return head + b"".join(pairs) + bytes(end)


def text(nbytes, key="general.architecture"):
    return pair(key, STRING, name("😀" + "a" * (nbytes - 4)))


GGUFS = {
    "tensors": (gguf(n_tensors=MANY, end=MANY * 24), "tensor count: 262144 items"),
    "keys": (gguf([pair(f"{number:x}", U8, b"\0") for number in range(MANY)]), "metadata count: 262144 items"),
    "nested": (gguf([pair("a", ARRAY, NESTED), pair("b", ARRAY, NESTED)]), "arrays nested deeper"),
    "strings": (gguf([pair(key, ARRAY, STRINGS) for key in "abc"]), "c: 524288 items, expected at most 0"),
    "text": (gguf([text(33 << 20)]), "bytes of the header are text, expected at most"),
    "texts": (gguf([text(17 << 20), text(17 << 20, "x")]), "bytes of the header are text, expected at most"),
    "numbers": (gguf([pair("a", ARRAY, array(U8, 65 << 20, bytes(65 << 20)))]), "of the header, expected at most"),
}


@pytest.mark.parametrize("kind", GGUFS)
def test_gguf(tmp_path, kind):
    content, message = GGUFS[kind]
    (tmp_path / "file.gguf").write_bytes(content)
    check_cheap(tmp_path / "file.gguf", message, read_header)


def test_one_gguf_in_many_parts(tmp_path):
    with pytest.raises(QuantError, match="99999 shards, expected at most 1000"):
        (tmp_path / "a-00001-of-99999.gguf").write_bytes(RawGGUF().pack())
        read_header(tmp_path / "a-00001-of-99999.gguf")


def repeated(item, count):
    return ("[" + f"{item}," * (count - 1) + item + "]").encode()


def entries(count, value):
    return json.dumps({f"{number:x}": value for number in range(count)}, separators=(",", ":")).encode()


ENTRY = {"dtype": "I8", "shape": [0], "data_offsets": [0, 0]}
JSONS = {
    "lists": (b'{"a":%s}' % repeated("[]", 5_000_000), "commas, colons and brackets, expected at most"),
    "tables": (b'{"a":%s}' % repeated("{}", 5_000_000), "commas, colons and brackets, expected at most"),
    "numbers": (b'{"a":%s}' % repeated("1", 8_000_000), "commas, colons and brackets, expected at most"),
    "digits": (b'{"a":%s}' % repeated("9" * 4000, 4000), "an integer of 4000 digits, expected at most 20"),
    "depth": (b'{"a":' + b"[" * 1_000_000, "maximum recursion depth"),
    "entries": (entries(20_000, ENTRY), "20000 tensors, expected at most 16384"),
    "metadata": (b'{"__metadata__":%s}' % entries(20_000, ""), "20000 keys in __metadata__, expected at most 16384"),
}


@pytest.mark.parametrize("kind", JSONS)
def test_safetensors(tmp_path, kind):
    header, message = JSONS[kind]
    (tmp_path / "file.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    check_cheap(tmp_path / "file.safetensors", message, open_checkpoint)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"weight_map":%s}' % repeated("[]", 5_000_000), "commas, colons and brackets, expected at most"),
        (b'{"weight_map":%s}' % entries(20_000, "a"), "20000 tensors, expected at most 16384"),
        (json.dumps({"weight_map": {f"{n}": f"{n}" for n in range(1001)}}).encode(), "1001 shards, expected at most"),
    ],
)
def test_index(tmp_path, content, message):
    (tmp_path / "file.safetensors.index.json").write_bytes(content)
    check_cheap(tmp_path / "file.safetensors.index.json", message, open_checkpoint)


def check_cheap(path, message, read):
    with counted_calls() as calls, pytest.raises(QuantError, match=message):
        read(path)
    assert calls.count < 1_200_000
    tracemalloc.start()
    with pytest.raises(QuantError):
        read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200e6


def test_the_tokenizer_of_umt5_is_read(tmp_path):
    pieces = 256_384
    tokens = [f"piece {number}" for number in range(pieces)]
    metadata = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": tokens,
        "tokenizer.ggml.scores": np.ones(pieces, np.float32),
        "tokenizer.ggml.token_type": np.ones(pieces, np.int32),
        "tokenizer.ggml.spiece_model": bytes(5 << 20),
        "tokenizer.huggingface.json": "万" * (6 << 20),
    }
    (tmp_path / "file.gguf").write_bytes(RawGGUF(pairs=[pack_metadata(metadata)], n_pairs=len(metadata)).pack())
    read = read_header(tmp_path / "file.gguf").metadata
    assert read["tokenizer.ggml.tokens"][-1] == tokens[-1]
    assert len(read["tokenizer.ggml.scores"]) == pieces
    assert read["tokenizer.huggingface.json"] == metadata["tokenizer.huggingface.json"]


def test_json_of_many_values_is_read():
    values = list(range(MAX_VALUES // 2))
    assert parse_json(json.dumps({"a": values}), "text", "") == {"a": values}
    assert parse_json(b"[18446744073709551615,-9223372036854775808]", "text", "") == [2**64 - 1, -(2**63)]
