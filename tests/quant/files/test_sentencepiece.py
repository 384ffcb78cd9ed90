"""Tokenizers that would take gigabytes, or hold values that no tokenizer has."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest

from wanquant.quant import QuantError
from wanquant.quant.files.sentencepiece import parse_vocabulary, sentencepiece_model
from wanquant.tests.counting import counted_calls

METADATA = {
    "tokenizer.ggml.model": "t5",
    "tokenizer.ggml.tokens": ["<pad>", "</s>", "<unk>", "a"],
    "tokenizer.ggml.scores": np.array([0, 0, 0, -1.5], np.float32),
    "tokenizer.ggml.token_type": np.array([3, 3, 2, 1], np.int32),
}
PIECE = b"\x0a\x00"


def message(content: bytes) -> bytes:
    """Return a piece of up to 127 bytes."""
    return b"\x0a" + bytes([len(content)]) + content


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (PIECE * (4 << 20), "more than 100 pieces, expected 1 to 100"),
        (b"\x08\x00" * (4 << 20), "expected a SentencePiece model"),
        (b"\x12\x00" * (4 << 20), "expected a SentencePiece model"),
        (b"\x0a\x80\x80\x80\x02" + b"\x10\x00" * (2 << 20), "expected a SentencePiece model"),
    ],
    ids=["pieces", "fields", "trainers", "fields of a piece"],
)
def test_only_as_many_fields_as_a_tokenizer_has_are_made(model, problem):
    with counted_calls() as calls, pytest.raises(QuantError, match=problem):
        parse_vocabulary(model, 100)
    assert calls.count < 4_000_000
    tracemalloc.start()
    with pytest.raises(QuantError):
        parse_vocabulary(model, 100)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6


def test_rows_beyond_any_vocabulary():
    with pytest.raises(QuantError, match="an embedding of 1073741824 rows"):
        parse_vocabulary(sentencepiece_model(METADATA), 1 << 30)


def test_a_vocabulary_of_the_size_of_umt5():
    pieces = b"".join(message(message(b"%06x" % number)) for number in range(256_300))
    vocabulary = parse_vocabulary(pieces, 256_384)
    assert vocabulary["tokenizer.ggml.tokens"][256_298:256_301] == ["03e92a", "03e92b", "[PAD256300]"]


def test_scores_that_are_not_numbers():
    with pytest.raises(QuantError, match="expected a SentencePiece model"):
        parse_vocabulary(message(message(b"a") + b"\x15" + struct.pack("<f", float("nan"))), 4)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("scores", np.array([1e300] * 4)),
        ("scores", np.array([np.nan] * 4, np.float32)),
        ("token_type", np.array([np.nan] * 4, np.float32)),
        ("token_type", np.array([1e300] * 4)),
        ("token_type", np.array([2**64 - 1] * 4, np.uint64)),
        ("token_type", np.array([1.5] * 4)),
    ],
)
def test_numbers_outside_the_range_of_their_type(key, values):
    with pytest.raises(QuantError, match=f"tokenizer.ggml.{key}: .*expected an array of finite numbers"):
        sentencepiece_model(METADATA | {f"tokenizer.ggml.{key}": values})


def test_numbers_of_other_types_are_converted():
    other = {"tokenizer.ggml.scores": np.array([0, 0, 0, -1.5]), "tokenizer.ggml.token_type": np.array([3.0, 3, 2, 1])}
    assert sentencepiece_model(METADATA | other) == sentencepiece_model(METADATA)
