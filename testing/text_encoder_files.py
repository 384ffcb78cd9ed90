"""What tests of text encoders share: a small umT5 with a tokenizer, and the names and files of other tools."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import sentencepiece
import torch
from torch import Tensor

from ..quant import QTYPES
from ..quant.gguf.layout import TensorSpec
from ..quant.gguf.writer import GGUFWriter

if TYPE_CHECKING:
    from comfy.sd import CLIP

WIDTH, HEADS = 64, 2
_BLOCKS, _FFN = 24, 10240  # by which the host recognizes umt5-xxl
TEXTS = (
    "a red ball moves right",
    "  two   spaces, CAPITALS and ﬁne ligatures!  ",
    "一个红色的球向右移动",
    "Ein grüner Würfel dreht sich; 3,5 Sekunden 🎬",
    "",
)
"""Prompts, of whose letters the tokenizer of the small umT5 consists."""
_WAN_PARTS = (
    ("shared.", "token_embedding."),
    ("encoder.final_layer_norm.", "norm."),
    ("encoder.block.", "blocks."),
    (".layer.0.SelfAttention.relative_attention_bias.", ".pos_embedding.embedding."),
    (".layer.0.SelfAttention.", ".attn."),
    (".layer.0.layer_norm.", ".norm1."),
    (".layer.1.layer_norm.", ".norm2."),
    (".layer.1.DenseReluDense.wi_0.", ".ffn.gate.0."),
    (".layer.1.DenseReluDense.wi_1.", ".ffn.fc1."),
    (".layer.1.DenseReluDense.wo.", ".ffn.fc2."),
)


def wan_name(name: str) -> str:
    """Return Wan's own name of a tensor: github.com/Wan-Video/Wan2.1 wan/modules/t5.py @ fc124fd."""
    for theirs, wans in _WAN_PARTS:
        name = name.replace(theirs, wans)
    return name


NAMINGS: Mapping[str, Callable[[str], str]] = {
    "only embed_tokens": lambda name: name.replace("shared.", "encoder.embed_tokens."),
    "a prefix": lambda name: f"text_encoders.umt5xxl.transformer.{name}",
    "Wan's": wan_name,
    "Wan's with a prefix": lambda name: f"model.{wan_name(name)}",
    "Wan's whole T5": lambda name: wan_name(name) if name.startswith("shared.") else f"encoder.{wan_name(name)}",
}
"""Functions from the host's name of a tensor to that of another tool."""


def random_weights(rows: int) -> dict[str, tuple[str, Tensor]]:
    """Return (name in llama.cpp, weight) by the host's tensor name, for a tokenizer of `rows` pieces."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float | None = None) -> Tensor:
        return torch.randn(shape, generator=generator) * (std or shape[-1] ** -0.5)

    tensors = {"shared.weight": ("token_embd.weight", normal(rows, WIDTH, std=1.0))}
    tensors["encoder.final_layer_norm.weight"] = ("enc.output_norm.weight", torch.ones(WIDTH))
    for i in range(_BLOCKS):
        host, llama = f"encoder.block.{i}.layer", f"enc.blk.{i}"
        for part in "qkvo":
            # T5 does not scale its attention scores, so its queries are initialized small.
            std = (WIDTH * WIDTH / HEADS) ** -0.5 if part == "q" else None
            weight = normal(WIDTH, WIDTH, std=std)
            tensors[f"{host}.0.SelfAttention.{part}.weight"] = (f"{llama}.attn_{part}.weight", weight)
        bias = normal(32, HEADS, std=1.0)
        tensors[f"{host}.0.SelfAttention.relative_attention_bias.weight"] = (f"{llama}.attn_rel_b.weight", bias)
        for name, other, shape in (
            ("wi_0", "ffn_gate", (_FFN, WIDTH)),
            ("wi_1", "ffn_up", (_FFN, WIDTH)),
            ("wo", "ffn_down", (WIDTH, _FFN)),
        ):
            tensors[f"{host}.1.DenseReluDense.{name}.weight"] = (f"{llama}.{other}.weight", normal(*shape))
        for layer, other in ((0, "attn_norm"), (1, "ffn_norm")):
            tensors[f"{host}.{layer}.layer_norm.weight"] = (f"{llama}.{other}.weight", torch.ones(WIDTH))
    return tensors


def tokens(clip: CLIP, text: str) -> list[int]:
    """Return the tokens that a text encoder of the host makes of a text."""
    ((row,),) = clip.tokenize(text).values()
    return [token for token, _ in row]


def trained_tokenizer(sentences: Iterable[str], vocabulary: int, *, normalization: str = "nmt_nfkc") -> bytes:
    """Return a unigram model of sentencepiece with umT5's special tokens, of at most `vocabulary` pieces.

    Args:
        normalization: sentencepiece's name of the rules, whose table takes 0.2 MB; "identity" has none.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=vocabulary,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
        normalization_rule_name=normalization,
    )
    return model.getvalue()


def write_packed(
    path: Path,
    weights: Mapping[str, tuple[str, Tensor]],
    metadata: Mapping[str, object],
    by_llama: bool,
    qtype: str = "Q8_0",
) -> Path:
    """Write what `random_weights` returned as a GGUF, its matrices in one type.

    Args:
        path: the path of the file.
        weights: (name in llama.cpp, weight) by the host's tensor name.
        metadata: the tokenizer, and what else the header holds.
        by_llama: whether tensors have llama.cpp's names, else the host's.
        qtype: the type of the matrices whose rows it divides; all else is F32.
    """
    tensors = {llama if by_llama else host: weight for host, (llama, weight) in weights.items()}
    types = {n: QTYPES[qtype if w.ndim == 2 and w.shape[1] % 32 == 0 else "F32"] for n, w in tensors.items()}
    specs = [TensorSpec(name, types[name], tuple(weight.shape)) for name, weight in tensors.items()]
    with GGUFWriter(path, {"general.architecture": "t5encoder", **metadata}, specs) as writer:
        for spec in specs:
            writer.write(spec.name, spec.qtype.quantize(tensors[spec.name], effort="fast"))
    return path


def write_as_others(
    path: Path, tensors: Mapping[str, Tensor], spiece: bytes | None, dtype: str = "F32", architecture: str = "pig"
) -> Path:
    """Write a GGUF with the PyPI package gguf, as the forks of ComfyUI-GGUF do.

    Args:
        path: the path of the file.
        tensors: the tensors as they are stored, float32 or float16.
        spiece: the tokenizer, stored as a tensor of numbers; None for a file without it.
        dtype: the ggml type of these numbers.
        architecture: the value of `general.architecture`.
    """
    writer = gguf.GGUFWriter(path, architecture)
    if spiece is not None:
        numbers, number = torch.frombuffer(bytearray(spiece), dtype=torch.uint8), gguf.GGMLQuantizationType[dtype]
        stored = gguf.quants.quantize(numbers.float().numpy(), number)
        writer.add_tensor("spiece_model", stored, raw_dtype=number)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
