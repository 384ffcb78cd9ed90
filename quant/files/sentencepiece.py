"""Conversion between SentencePiece models and the vocabularies of GGUF files.

The package sentencepiece, on which ComfyUI depends, is not used: it can load a model, but not write one. ComfyUI's
tokenizer needs a model, which is made from the vocabulary of a GGUF here. The package's own Python classes for models
(`sentencepiece_model_pb2`) need protobuf, on which neither the package nor ComfyUI depends.

Source: google/sentencepiece src/sentencepiece_model.proto @ v0.2.0; protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..errors import QuantError
from .typed_metadata import TypedMetadata

SPIECE_KEY = "tokenizer.ggml.spiece_model"
"""UINT8 array: the serialized SentencePiece model, as ComfyUI's tokenizer takes it."""

# Field numbers of ModelProto, then of its SentencePiece, TrainerSpec and NormalizerSpec messages.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE, _SCORE, _TYPE = 1, 2, 3
_SPECIAL_IDS = {"unknown": (40, 0), "bos": (41, 1), "eos": (42, 2), "padding": (43, -1)}
"""Field numbers in the TrainerSpec, and their default values."""
_MODEL_TYPE, _VOCABULARY_SIZE = 3, 4
_CHARSMAP, _DUMMY_PREFIX, _REMOVE_SPACES = 2, 3, 4

# The limits of a model's pieces, of the fields of a piece, and of all other fields; umT5 has 256,384 pieces.
_MAX_PIECES, _MAX_PIECE_FIELDS, _MAX_FIELDS = 1 << 19, 16, 1 << 14

# Types of pieces.
_NORMAL, _UNUSED = 1, 5
_UNUSED_SCORE = -10000.0
_ID_MASK = 0xFFFFFFFF
_UNIGRAM = 1


def parse_vocabulary(model: bytes, n_rows: int) -> dict[str, Any]:
    """Return the `tokenizer.ggml.*` metadata for a SentencePiece model, as llama.cpp's converter writes it.

    Args:
        model: the serialized model.
        n_rows: the number of rows of the embedding. Rows beyond the vocabulary get unused tokens.

    Raises:
        QuantError: `model` is not a SentencePiece model, or has more pieces than the embedding has rows.
    """
    if n_rows > _MAX_PIECES:
        raise QuantError(
            f"tokenizer: an embedding of {n_rows} rows, expected at most {_MAX_PIECES}; download the text encoder again"
        )
    try:
        pieces, trainer, normalizer = _parts(model, n_rows)
        tokens = [_bytes(piece[_PIECE]).decode() for piece in pieces]
        scores = [struct.unpack("<f", piece.get(_SCORE, bytes(4)))[0] for piece in pieces]
        if not np.isfinite(scores).all():
            raise ValueError("a score is not finite")
        types = [_signed(piece.get(_TYPE, _NORMAL)) for piece in pieces]
        ids = {name: _signed(trainer.get(field, default)) for name, (field, default) in _SPECIAL_IDS.items()}
        charsmap = _bytes(normalizer.get(_CHARSMAP, b""))
    except QuantError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, struct.error) as error:
        raise QuantError(
            f"tokenizer: {len(model)} bytes of something else, expected a SentencePiece model; use the spiece.model of"
            " this text encoder"
        ) from error
    if not tokens:
        raise QuantError(
            f"tokenizer: 0 pieces, expected 1 to {n_rows}, the rows of the embedding; use the spiece.model"
            " of this text encoder"
        )
    n_unused = n_rows - len(tokens)
    return {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens + [f"[PAD{number}]" for number in range(len(tokens), n_rows)],
        "tokenizer.ggml.scores": np.array(scores + [_UNUSED_SCORE] * n_unused, np.float32),
        "tokenizer.ggml.token_type": np.array(types + [_UNUSED] * n_unused, np.int32),
        **{f"tokenizer.ggml.{name}_token_id": number for name, number in ids.items() if number >= 0},
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": True,
        "tokenizer.ggml.add_space_prefix": bool(normalizer.get(_DUMMY_PREFIX, True)),
        "tokenizer.ggml.remove_extra_whitespaces": bool(normalizer.get(_REMOVE_SPACES, True)),
        **({"tokenizer.ggml.precompiled_charsmap": charsmap} if charsmap else {}),
    }


def sentencepiece_model(metadata: Mapping[str, Any]) -> bytes:
    """Return the serialized SentencePiece model (ModelProto) of a GGUF's tokenizer.

    Raises:
        QuantError: the metadata have no such tokenizer (see `has_tokenizer`), or values of another type.
    """
    values = TypedMetadata(metadata, "tokenizer")
    if SPIECE_KEY in metadata:
        return values.raw(SPIECE_KEY)
    tokens, model = values.texts("tokenizer.ggml.tokens"), values.text("tokenizer.ggml.model", "missing")
    if not tokens or model != "t5":
        raise QuantError(
            f"tokenizer.ggml.model: {model}, expected t5 with its tokens;"
            " choose a T5 or umT5 text encoder that was converted with its tokenizer"
        )
    scores = values.numbers("tokenizer.ggml.scores", np.float32)
    types = values.numbers("tokenizer.ggml.token_type", np.int32)
    if not len(tokens) == len(scores) == len(types):
        raise QuantError(
            f"tokenizer: {len(tokens)} tokens, {len(scores)} scores and {len(types)} types, expected as many of each;"
            " the file is damaged, convert the text encoder again"
        )
    pieces = (
        _message(_PIECES, _message(_PIECE, token.encode()) + _float(_SCORE, score) + _integer(_TYPE, kind))
        for token, score, kind in zip(tokens, scores.tolist(), types.tolist(), strict=True)
    )
    settings = (_message(_TRAINER, _trainer(values, len(tokens))), _message(_NORMALIZER, _normalizer(values)))
    return b"".join((*pieces, *settings))


def has_tokenizer(metadata: Mapping[str, Any]) -> bool:
    """Return whether the metadata of a GGUF have a sentencepiece model, or the tokens of one of T5's kind."""
    is_t5 = isinstance(model := metadata.get("tokenizer.ggml.model"), str) and model == "t5"
    return SPIECE_KEY in metadata or (is_t5 and "tokenizer.ggml.tokens" in metadata)


def _trainer(metadata: TypedMetadata, n_tokens: int) -> bytes:
    ids = (
        _integer(field, metadata.integer(f"tokenizer.ggml.{name}_token_id", -1))
        for name, (field, _) in _SPECIAL_IDS.items()
    )
    return _integer(_MODEL_TYPE, _UNIGRAM) + _integer(_VOCABULARY_SIZE, n_tokens) + b"".join(ids)


def _normalizer(metadata: TypedMetadata) -> bytes:
    charsmap = metadata.raw("tokenizer.ggml.precompiled_charsmap")
    add_prefix = metadata.flag("tokenizer.ggml.add_space_prefix", default=True)
    remove_spaces = metadata.flag("tokenizer.ggml.remove_extra_whitespaces", default=True)
    return _message(_CHARSMAP, charsmap) + _integer(_DUMMY_PREFIX, add_prefix) + _integer(_REMOVE_SPACES, remove_spaces)


def _parts(model: bytes, n_rows: int) -> tuple[list[dict[int, Any]], dict[int, Any], dict[int, Any]]:
    """Return the fields of each piece, of the TrainerSpec and of the NormalizerSpec.

    Raises:
        QuantError: more pieces than the embedding has rows.
    """
    pieces: list[dict[int, Any]] = []
    specs: dict[int, list[bytes]] = {_TRAINER: [], _NORMALIZER: []}
    for field, value in _fields(model, _MAX_PIECES + _MAX_FIELDS):
        if field == _PIECES and len(pieces) == n_rows:
            raise QuantError(
                f"tokenizer: more than {n_rows} pieces, expected 1 to {n_rows}, the rows of the embedding; use the"
                " spiece.model of this text encoder"
            )
        if field == _PIECES:
            pieces.append(dict(_fields(value, _MAX_PIECE_FIELDS)))
        elif field in specs:
            specs[field].append(value)
    trainer, normalizer = (dict(_fields(b"".join(spec), _MAX_FIELDS)) for spec in specs.values())
    return pieces, trainer, normalizer


def _fields(message: bytes, limit: int) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value of each field of a protobuf message: int for a varint, else bytes.

    Raises:
        ValueError: not such a message, or more than `limit` fields.
    """
    position = n_fields = 0
    while position < len(message):
        n_fields += 1
        if n_fields > limit:
            raise ValueError(f"more than {limit} fields")
        key, position = _read_varint(message, position)
        field, wire = key >> 3, key & 7
        if wire == 0:
            value, position = _read_varint(message, position)
            yield field, value
            continue
        if wire == 2:
            size, position = _read_varint(message, position)
        else:
            size = {1: 8, 5: 4}[wire]
        if position + size > len(message):
            raise ValueError("a field ends past the end of the message")
        yield field, message[position : position + size]
        position += size


def _read_varint(message: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a varint has more than 10 bytes")


def _bytes(value: int | bytes) -> bytes:
    """Return the value of a field that is bytes in a model; another message may have a number there."""
    if isinstance(value, int):
        raise TypeError(f"{value} in place of bytes")
    return value


def _signed(value: int) -> int:
    """Return the int32 that is stored as a varint; a negative one is stored with 64 bits."""
    value &= _ID_MASK
    return value - (1 << 32) if value >> 31 else value


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(int(value))


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers are stored with all 64 bits
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
