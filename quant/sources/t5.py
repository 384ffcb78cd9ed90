"""T5 text encoders (Wan uses umT5): their tensor names and metadata in llama.cpp.

Source: the PyPI package gguf 0.19, constants.py MODEL_ARCH.T5ENCODER and Keys; for Wan's names,
github.com/Wan-Video/Wan2.1 wan/modules/t5.py @ fc124fd.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import QuantError
from ..files.regular_file import open_regular
from ..files.sentencepiece import SPIECE_KEY, has_tokenizer, parse_vocabulary, sentencepiece_model
from .renaming import Rule, rename, rules

SPIECE_TENSOR = "spiece_model"
SPIECE_FILE = "spiece.model"
"""The name of a tokenizer that may lie in the folder of a text encoder."""

_TOKENIZER_KEYS, _SIZE_KEYS = "tokenizer.", "t5encoder."
_CONTEXT_LENGTH = 512
_EPSILON = 1e-6

_TRANSFORMERS = rules(
    (r"(shared|encoder\.embed_tokens)\.", "token_embd."),
    (r"encoder\.final_layer_norm\.", "enc.output_norm."),
    (r"encoder\.block\.(\d{1,9})\.layer\.0\.SelfAttention\.([qkvo])\.", r"enc.blk.\1.attn_\2."),
    (r"encoder\.block\.(\d{1,9})\.layer\.0\.SelfAttention\.relative_attention_bias\.", r"enc.blk.\1.attn_rel_b."),
    (r"encoder\.block\.(\d{1,9})\.layer\.0\.layer_norm\.", r"enc.blk.\1.attn_norm."),
    (r"encoder\.block\.(\d{1,9})\.layer\.1\.DenseReluDense\.wi_0\.", r"enc.blk.\1.ffn_gate."),
    (r"encoder\.block\.(\d{1,9})\.layer\.1\.DenseReluDense\.wi(_1)?\.", r"enc.blk.\1.ffn_up."),
    (r"encoder\.block\.(\d{1,9})\.layer\.1\.DenseReluDense\.wo\.", r"enc.blk.\1.ffn_down."),
    (r"encoder\.block\.(\d{1,9})\.layer\.1\.layer_norm\.", r"enc.blk.\1.ffn_norm."),
)
# A checkpoint of the whole T5 has its encoder's blocks under `encoder.`.
_WAN = rules(
    (r"(?:encoder\.)?token_embedding\.", "token_embd."),
    (r"(?:encoder\.)?norm\.", "enc.output_norm."),
    (r"(?:encoder\.)?blocks\.(\d{1,9})\.attn\.([qkvo])\.", r"enc.blk.\1.attn_\2."),
    (r"(?:encoder\.)?blocks\.(\d{1,9})\.pos_embedding\.embedding\.", r"enc.blk.\1.attn_rel_b."),
    (r"(?:encoder\.)?blocks\.(\d{1,9})\.norm1\.", r"enc.blk.\1.attn_norm."),
    (r"(?:encoder\.)?blocks\.(\d{1,9})\.ffn\.gate\.0\.", r"enc.blk.\1.ffn_gate."),
    (r"(?:encoder\.)?blocks\.(\d{1,9})\.ffn\.fc1\.", r"enc.blk.\1.ffn_up."),
    (r"(?:encoder\.)?blocks\.(\d{1,9})\.ffn\.fc2\.", r"enc.blk.\1.ffn_down."),
    (r"(?:encoder\.)?blocks\.(\d{1,9})\.norm2\.", r"enc.blk.\1.ffn_norm."),
)
_LLAMA = rules((r"(token_embd|enc)\.", r"\1."))

_TO_TRANSFORMERS = rules(
    (r"token_embd\.", "shared."),
    (r"enc\.output_norm\.", "encoder.final_layer_norm."),
    (r"enc\.blk\.(\d{1,9})\.attn_([qkvo])\.", r"encoder.block.\1.layer.0.SelfAttention.\2."),
    (r"enc\.blk\.(\d{1,9})\.attn_rel_b\.", r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias."),
    (r"enc\.blk\.(\d{1,9})\.attn_norm\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"enc\.blk\.(\d{1,9})\.ffn_gate\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"enc\.blk\.(\d{1,9})\.ffn_up\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"enc\.blk\.(\d{1,9})\.ffn_down\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
    (r"enc\.blk\.(\d{1,9})\.ffn_norm\.", r"encoder.block.\1.layer.1.layer_norm."),
)

_TABLES: Sequence[tuple[str, Sequence[Rule]]] = (
    ("encoder.block.0.layer.0.SelfAttention.q.weight", _TRANSFORMERS),
    ("enc.blk.0.attn_q.weight", _LLAMA),
    ("encoder.blocks.0.attn.q.weight", _WAN),
    ("blocks.0.attn.q.weight", _WAN),
)
"""The tables that rename to llama.cpp's names, with the name of a tensor that only this naming has."""

_EMBEDDINGS = (
    *("shared.weight", "encoder.embed_tokens.weight", "token_embd.weight"),
    *("token_embedding.weight", "encoder.token_embedding.weight"),
)
# Those that represent every byte, by their names in safetensors.
_DTYPES_OF_BYTES = {
    **{"U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64},
    **{"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64},
}
# The tokenizer of umT5 has 4.5 MB.
_MAX_TOKENIZER_BYTES = 8 << 20


class EncoderNaming(NamedTuple):
    """The naming of the tensors of a T5 text encoder."""

    prefix: str
    table: Sequence[Rule]

    def rename(self, name: str) -> str | None:
        """Return llama.cpp's name for a name without prefix; None for a tensor of the decoder or another model."""
        return rename(name, self.table)


def find_encoder(names: Collection[str]) -> EncoderNaming | None:
    """Return the naming of the T5 text encoder that has some of these tensors, or None if there is none.

    Any prefix is accepted under which there is an embedding too.
    """
    known = set(names)
    for key, table in _TABLES:
        for prefix in sorted({name.removesuffix(key) for name in known if name.endswith(key)}, key=len):
            if not prefix or (prefix.endswith(".") and any(prefix + name in known for name in _EMBEDDINGS)):
                return EncoderNaming(prefix, table)
    return None


def encoder_names(names: Collection[str]) -> dict[str, str]:
    """Return the names in the file of a text encoder's tensors, by llama.cpp's names.

    Tensors of a decoder or another model, and further names of the same tensor, are left out.
    """
    naming = find_encoder(names)
    if naming is None:
        return {}
    renamed: dict[str, str] = {}
    for name in names:
        new = naming.rename(name[len(naming.prefix) :]) if name.startswith(naming.prefix) else None
        if new is not None:
            renamed.setdefault(new, name)
    return renamed


def tokenizer(path: Path, metadata: Mapping[str, Any], stored: tuple[str, Tensor] | None) -> bytes:
    """Return the sentencepiece model of a text encoder.

    Args:
        path: the path of the file; its folder may contain spiece.model.
        metadata: the metadata of a GGUF, or {}.
        stored: the dtype and the bytes, uint8, (nbytes,), of the tensor that holds the sentencepiece model; None
            without such a tensor.

    Raises:
        QuantError: no tokenizer, or a damaged one.
    """
    try:
        if has_tokenizer(metadata):
            return sentencepiece_model(metadata)
        if stored is not None:
            return _tensor_bytes(*stored)
    except QuantError as error:
        raise QuantError(f"{path}: {error}") from None
    beside = path.with_name(SPIECE_FILE)
    if beside.is_file():
        with open_regular(beside) as file:
            return file.read(_MAX_TOKENIZER_BYTES)
    raise QuantError(
        f"{path}: has no tokenizer (tensor {SPIECE_TENSOR}), which the text encoder needs;"
        f" use ComfyUI's file of the encoder, or put {SPIECE_FILE} into the same folder"
    )


def check_tokenizer(path: Path, spiece: bytes, n_rows: int) -> dict[str, Any]:
    """Return the metadata of a sentencepiece model for an embedding of `n_rows` rows.

    Raises:
        QuantError: a damaged tokenizer, or one with more pieces than rows.
    """
    try:
        return parse_vocabulary(spiece, n_rows)
    except QuantError as error:
        raise QuantError(f"{path}: {error}") from None


def is_tokenizer(name: str) -> bool:
    """Return whether a tensor of this name, with or without a prefix, holds the sentencepiece model."""
    return name.rpartition(".")[2] == SPIECE_TENSOR


def t5_metadata(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    metadata: Mapping[str, Any],
    stored: tuple[str, Tensor] | None,
) -> dict[str, Any]:
    """Return the GGUF metadata of a text encoder; what a GGUF source says about it is kept.

    Args:
        path: the path of the checkpoint.
        shapes: the shapes of all tensors of the encoder by llama.cpp's names.
        metadata: as for `tokenizer`.
        stored: as for `tokenizer`, with uint8, (nbytes,).

    Raises:
        QuantError: no tokenizer or one of another encoder, or a matrix without 2 dimensions.
    """
    spiece = tokenizer(path, metadata, stored)
    kept = (_TOKENIZER_KEYS, _SIZE_KEYS) if has_tokenizer(metadata) else (_SIZE_KEYS,)
    known = {key: value for key, value in metadata.items() if key.startswith(kept)}
    vocabulary = check_tokenizer(path, spiece, shapes["token_embd.weight"][0]) | {SPIECE_KEY: spiece}
    made = _dimensions(path, shapes) | ({} if has_tokenizer(metadata) else vocabulary)
    return known | {key: value for key, value in made.items() if key not in known}


def transformers_name(name: str) -> str:
    """Return the name that ComfyUI reads for a tensor of a text encoder; other names stay as they are."""
    return rename(name, _TO_TRANSFORMERS) or name


def _tensor_bytes(dtype: str, data: Tensor) -> bytes:
    """Return the bytes that a tensor holds as numbers; negative ones are those of signed bytes."""
    number = _DTYPES_OF_BYTES.get(dtype)
    if number is None or data.numel() > _MAX_TOKENIZER_BYTES * number.itemsize:
        raise QuantError(
            f"tensor {SPIECE_TENSOR}: {data.numel():,} bytes of {dtype}, expected up to {_MAX_TOKENIZER_BYTES:,}"
            " numbers from 0 to 255; download the file again"
        )
    if dtype == "U8":
        return data.numpy().tobytes()
    # A copy, because a tensor may begin anywhere in its file.
    numbers = data.clone().view(number).double()
    if not bool(((numbers >= -128) & (numbers <= 255) & (numbers == numbers.round())).all()):
        raise QuantError(f"tensor {SPIECE_TENSOR}: not numbers from 0 to 255; download the file again")
    return numbers.to(torch.int16).to(torch.uint8).numpy().tobytes()


def _dimensions(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    matrices = ("token_embd", "enc.blk.0.attn_rel_b", "enc.blk.0.ffn_up", "enc.blk.0.attn_k", "enc.blk.0.attn_v")
    for name in (f"{matrix}.weight" for matrix in matrices):
        if len(shapes[name]) != 2 or 0 in shapes[name]:
            raise QuantError(
                f"{path}: tensor {name}: shape {shapes[name]}, expected 2 dimensions; download the file again"
            )
    buckets, heads = shapes["enc.blk.0.attn_rel_b.weight"]
    blocks = [int(match[1]) for name in shapes if (match := re.match(r"enc\.blk\.(\d{1,9})\.", name))]
    return {
        "t5encoder.context_length": _CONTEXT_LENGTH,
        "t5encoder.embedding_length": shapes["token_embd.weight"][1],
        "t5encoder.feed_forward_length": shapes["enc.blk.0.ffn_up.weight"][0],
        "t5encoder.block_count": max(blocks) + 1,
        "t5encoder.attention.head_count": heads,
        "t5encoder.attention.key_length": shapes["enc.blk.0.attn_k.weight"][0] // heads,
        "t5encoder.attention.value_length": shapes["enc.blk.0.attn_v.weight"][0] // heads,
        "t5encoder.attention.layer_norm_epsilon": _EPSILON,
        "t5encoder.attention.layer_norm_rms_epsilon": _EPSILON,
        "t5encoder.attention.relative_buckets_count": buckets,
    }
