"""The sentencepiece model of a text encoder's GGUF: as it was embedded, or rebuilt from the vocabulary.

Source: google/sentencepiece src/sentencepiece_model.proto @ v0.2.0; protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from .errors import QuantError

SPIECE_KEY = "tokenizer.ggml.spiece_model"
"""UINT8 array: the sentencepiece model as the host's tokenizer takes it."""

_UNIGRAM = 1


def sentencepiece_model(metadata: Mapping[str, Any]) -> bytes:
    """The serialized ModelProto of a GGUF's tokenizer.

    Raises:
        QuantError: no unigram tokenizer in the metadata.
    """
    if SPIECE_KEY in metadata:
        return np.asarray(metadata[SPIECE_KEY], np.uint8).tobytes()
    tokens = metadata.get("tokenizer.ggml.tokens")
    if tokens is None or metadata.get("tokenizer.ggml.model") != "t5":
        raise QuantError(
            f"tokenizer.ggml.model is {metadata.get('tokenizer.ggml.model', 'not given')}: expected t5 with its tokens;"
            " the file is not a T5 text encoder, or was made without its tokenizer"
        )
    scores, types = metadata["tokenizer.ggml.scores"], metadata["tokenizer.ggml.token_type"]
    pieces = (
        _message(1, _message(1, token.encode()) + _float(2, score) + _integer(3, kind))
        for token, score, kind in zip(tokens, np.asarray(scores).tolist(), np.asarray(types).tolist(), strict=True)
    )
    return b"".join((*pieces, _message(2, _trainer(metadata, len(tokens))), _message(3, _normalizer(metadata))))


def _trainer(metadata: Mapping[str, Any], n_tokens: int) -> bytes:
    names = {"unknown": 40, "bos": 41, "eos": 42, "padding": 43}
    ids = (_integer(field, metadata.get(f"tokenizer.ggml.{name}_token_id", -1)) for name, field in names.items())
    return _integer(3, _UNIGRAM) + _integer(4, n_tokens) + b"".join(ids)


def _normalizer(metadata: Mapping[str, Any]) -> bytes:
    charsmap = np.asarray(metadata.get("tokenizer.ggml.precompiled_charsmap", ()), np.uint8).tobytes()
    add_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    remove_spaces = metadata.get("tokenizer.ggml.remove_extra_whitespaces", True)
    return _message(2, charsmap) + _integer(3, add_prefix) + _integer(4, remove_spaces)


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(int(value))


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers take all 64 bits
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
