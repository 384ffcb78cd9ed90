"""T5 text encoders (Wan uses umT5): their tensor names and metadata in llama.cpp.

Source: the PyPI package gguf 0.19, constants.py MODEL_ARCH.T5ENCODER and Keys; for Wan's names,
github.com/Wan-Video/Wan2.1 wan/modules/t5.py @ fc124fd.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import QuantError
from ..files.regular_file import open_regular
from ..files.sentencepiece import SPIECE_KEY, parse_vocabulary
from .renaming import rename, rules

SPIECE_TENSOR = "spiece_model"

_KEPT_KEYS = ("tokenizer.", "t5encoder.")
_CONTEXT_LENGTH = 512
_EPSILON = 1e-6

_TRANSFORMERS = rules(
    (r"(shared|encoder\.embed_tokens)\.", "token_embd."),
    (r"encoder\.final_layer_norm\.", "enc.output_norm."),
    (r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.([qkvo])\.", r"enc.blk.\1.attn_\2."),
    (r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.relative_attention_bias\.", r"enc.blk.\1.attn_rel_b."),
    (r"encoder\.block\.(\d+)\.layer\.0\.layer_norm\.", r"enc.blk.\1.attn_norm."),
    (r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_0\.", r"enc.blk.\1.ffn_gate."),
    (r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi(_1)?\.", r"enc.blk.\1.ffn_up."),
    (r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wo\.", r"enc.blk.\1.ffn_down."),
    (r"encoder\.block\.(\d+)\.layer\.1\.layer_norm\.", r"enc.blk.\1.ffn_norm."),
)
_WAN = rules(
    (r"token_embedding\.", "token_embd."),
    (r"norm\.", "enc.output_norm."),
    (r"blocks\.(\d+)\.attn\.([qkvo])\.", r"enc.blk.\1.attn_\2."),
    (r"blocks\.(\d+)\.pos_embedding\.embedding\.", r"enc.blk.\1.attn_rel_b."),
    (r"blocks\.(\d+)\.norm1\.", r"enc.blk.\1.attn_norm."),
    (r"blocks\.(\d+)\.ffn\.gate\.0\.", r"enc.blk.\1.ffn_gate."),
    (r"blocks\.(\d+)\.ffn\.fc1\.", r"enc.blk.\1.ffn_up."),
    (r"blocks\.(\d+)\.ffn\.fc2\.", r"enc.blk.\1.ffn_down."),
    (r"blocks\.(\d+)\.norm2\.", r"enc.blk.\1.ffn_norm."),
)
_LLAMA = rules((r"(token_embd|enc)\.", r"\1."))

_TO_TRANSFORMERS = rules(
    (r"token_embd\.", "shared."),
    (r"enc\.output_norm\.", "encoder.final_layer_norm."),
    (r"enc\.blk\.(\d+)\.attn_([qkvo])\.", r"encoder.block.\1.layer.0.SelfAttention.\2."),
    (r"enc\.blk\.(\d+)\.attn_rel_b\.", r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias."),
    (r"enc\.blk\.(\d+)\.attn_norm\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"enc\.blk\.(\d+)\.ffn_gate\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"enc\.blk\.(\d+)\.ffn_up\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"enc\.blk\.(\d+)\.ffn_down\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
    (r"enc\.blk\.(\d+)\.ffn_norm\.", r"encoder.block.\1.layer.1.layer_norm."),
)

NAMINGS: Mapping[str, Callable[[str], str | None]] = {
    "encoder.block.0.layer.0.SelfAttention.q.weight": partial(rename, table=_TRANSFORMERS),
    "blocks.0.attn.q.weight": partial(rename, table=_WAN),
    "enc.blk.0.attn_q.weight": partial(rename, table=_LLAMA),
}
"""The functions that rename to llama.cpp's names, by the name of a tensor that only this naming has.

They return None for the tensors of a decoder, which are left out.
"""

# The tokenizer of umT5 has 4.5 MB.
_MAX_TOKENIZER_BYTES = 1 << 26


def t5_metadata(path: Path, shapes: Mapping[str, tuple[int, ...]], spiece: bytes | None) -> dict[str, Any]:
    """Return the GGUF metadata of a text encoder.

    Args:
        path: the path of the checkpoint.
        shapes: the shapes of its tensors by llama.cpp's names.
        spiece: the sentencepiece model; if None, it is read from the file spiece.model in the same folder.

    Raises:
        QuantError: no tokenizer, or a missing tensor.
    """
    beside = path.with_name("spiece.model")
    if spiece is None and beside.is_file():
        with open_regular(beside) as file:
            spiece = file.read(_MAX_TOKENIZER_BYTES)
    if spiece is None:
        raise QuantError(
            f"{path}: has no tokenizer (tensor {SPIECE_TENSOR}), which the text encoder needs;"
            " use ComfyUI's file of the encoder, or put spiece.model into the same folder"
        )
    try:
        return _dimensions(shapes) | parse_vocabulary(spiece, shapes["token_embd.weight"][0]) | {SPIECE_KEY: spiece}
    except KeyError as error:
        raise QuantError(
            f"{path}: tensor {error.args[0]}: missing, expected a complete text encoder; download it again"
        ) from None
    except QuantError as error:
        raise QuantError(f"{path}: {error}") from None


def transformers_name(name: str) -> str:
    """Return the name that ComfyUI reads for a tensor of a text encoder; other names stay as they are."""
    return rename(name, _TO_TRANSFORMERS) or name


def kept_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata that a GGUF made from another GGUF keeps."""
    return {key: value for key, value in metadata.items() if key.startswith(_KEPT_KEYS)}


def _dimensions(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    buckets, heads = shapes["enc.blk.0.attn_rel_b.weight"]
    blocks = [int(match[1]) for name in shapes if (match := re.match(r"enc\.blk\.(\d+)\.", name))]
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
