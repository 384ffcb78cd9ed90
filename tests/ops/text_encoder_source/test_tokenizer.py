"""The tokenizer of umT5 goes into the GGUF, from wherever a source has it."""

from __future__ import annotations

import numpy as np
import pytest
import sentencepiece
import torch
from comfy.text_encoders.spiece_tokenizer import SPieceTokenizer
from safetensors.torch import save_file

from wanquant.quant import QuantError, convert, open_gguf
from wanquant.quant.files.sentencepiece import SPIECE_KEY, parse_vocabulary, sentencepiece_model
from wanquant.testing.text_encoder_files import wan_name, write_as_others
from wanquant.tests.ops.text_encoder_source.umt5 import CONFIG, SPIECE, check_values, in_float32


def test_original_names_with_the_tokenizer_beside(state, tmp_path):
    save_file({wan_name(name): value for name, value in state.items()}, tmp_path / "a.safetensors")
    with pytest.raises(QuantError, match=r"has no tokenizer \(tensor spiece_model\).*put spiece\.model into"):
        convert(tmp_path / "a.safetensors", tmp_path / "a.gguf", "BF16")
    (tmp_path / "spiece.model").write_bytes(SPIECE.read_bytes())
    check_values(convert(tmp_path / "a.safetensors", tmp_path / "a.gguf", "BF16").path, state)


def test_tokenizer(source, spiece, tmp_path):
    metadata = open_gguf(convert(source, tmp_path / "a.gguf", "Q8_0", effort="fast").path).metadata
    embedded = SPieceTokenizer(torch.from_numpy(metadata[SPIECE_KEY].copy()))
    processor = sentencepiece.SentencePieceProcessor(model_proto=spiece.numpy().tobytes())
    for text in ("a cat, sitting", "一只猫坐在草地上", "Ünïcödé  double  spaces"):
        assert embedded(text)["input_ids"] == processor.encode(text, add_eos=True)
    n_pieces = processor.get_piece_size()
    tokens = list(metadata["tokenizer.ggml.tokens"])
    assert tokens[:n_pieces] == [processor.id_to_piece(i) for i in range(n_pieces)]
    assert len(tokens) == CONFIG["vocab_size"] == len(metadata["tokenizer.ggml.scores"])
    assert metadata["tokenizer.ggml.scores"][:n_pieces].tolist() == [processor.get_score(i) for i in range(n_pieces)]
    types = metadata["tokenizer.ggml.token_type"]
    assert [kind == 3 for kind in types[:n_pieces]] == [processor.is_control(i) for i in range(n_pieces)]
    assert [kind == 6 for kind in types[:n_pieces]] == [processor.is_byte(i) for i in range(n_pieces)]
    assert metadata["tokenizer.ggml.eos_token_id"] == processor.eos_id()
    assert metadata["tokenizer.ggml.unknown_token_id"] == processor.unk_id()
    assert metadata.get("tokenizer.ggml.padding_token_id", -1) == processor.pad_id()


def test_comfyui_gguf_reads_the_tokenizer(fields):
    """Its keys and types; the padding of umT5, whose vocabulary has one, is read too.

    Source: city96/ComfyUI-GGUF loader.py gguf_clip_loader, gguf_tokenizer_loader @ 795e451.
    """
    assert fields["general.architecture"].contents() in ("t5", "t5encoder")
    assert fields["tokenizer.ggml.model"].contents() == "t5"
    types = {key: [kind.name for kind in field.types] for key, field in fields.items()}
    for key in ("add_space_prefix", "remove_extra_whitespaces"):
        assert types[f"tokenizer.ggml.{key}"] == ["BOOL"]
    for key, kind in (("tokens", "STRING"), ("scores", "FLOAT32"), ("token_type", "INT32")):
        assert types[f"tokenizer.ggml.{key}"] == ["ARRAY", kind]
    assert types["tokenizer.ggml.eos_token_id"] == ["UINT32"]


def test_requantizing_keeps_the_tokenizer(source, tmp_path):
    first = open_gguf(convert(source, tmp_path / "a.gguf", "Q8_0", effort="fast").path)
    second = open_gguf(convert(first.path, tmp_path / "b.gguf", "Q4_0", effort="fast").path)
    assert second.tensors.keys() == first.tensors.keys()
    assert second.metadata["general.architecture"] == "t5encoder"
    kept = [key for key in first.metadata if key.startswith(("tokenizer.", "t5encoder."))]
    assert len(kept) > 20
    for key in kept:
        before, after = first.metadata[key], second.metadata[key]
        assert after == before if np.isscalar(before) else list(after) == list(before)


def test_a_gguf_source_needs_a_tokenizer_too(state, tmp_path):
    path = write_as_others(tmp_path / "a.gguf", in_float32(state), None)
    with pytest.raises(QuantError, match=r"has no tokenizer \(tensor spiece_model\).*put spiece\.model into"):
        convert(path, tmp_path / "b.gguf", "BF16")
    assert not (tmp_path / "b.gguf").exists()
    (tmp_path / "spiece.model").write_bytes(SPIECE.read_bytes())
    report = convert(path, tmp_path / "b.gguf", "BF16")
    check_values(report.path, state)
    assert report.metadata[SPIECE_KEY].tobytes() == SPIECE.read_bytes()
    assert report.metadata["t5encoder.block_count"] == 2


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "int32", "uint8"])
def test_tokenizer_as_a_tensor_of_any_dtype(state, spiece, tmp_path, dtype):
    stored = spiece.view(torch.int8) if dtype == "int8" else spiece.to(getattr(torch, dtype))
    save_file(state | {"text_encoder.spiece_model": stored}, tmp_path / "a.safetensors")
    report = convert(tmp_path / "a.safetensors", tmp_path / "a.gguf", "BF16")
    assert report.metadata[SPIECE_KEY].tobytes() == SPIECE.read_bytes()


@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_tokenizer_as_a_tensor_of_a_gguf(state, tmp_path, dtype):
    path = write_as_others(tmp_path / "a.gguf", in_float32(state), SPIECE.read_bytes(), dtype, "cow")
    report = convert(path, tmp_path / "b.gguf", "BF16")
    check_values(report.path, state)
    assert report.metadata[SPIECE_KEY].tobytes() == SPIECE.read_bytes()
    assert report.metadata["general.architecture"] == "t5encoder"


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (torch.full((64,), 0.5), "spiece_model: not numbers from 0 to 255"),
        (torch.full((64,), float("nan")), "spiece_model: not numbers from 0 to 255"),
        (torch.full((64,), 300.0), "spiece_model: not numbers from 0 to 255"),
        (torch.ones(64).to(torch.float8_e4m3fn), "spiece_model: 64 bytes of F8_E4M3, expected up to"),
    ],
)
def test_a_tensor_that_holds_no_tokenizer(state, tmp_path, stored, message):
    save_file(state | {"spiece_model": stored}, tmp_path / "a.safetensors")
    with pytest.raises(QuantError, match=message):
        convert(tmp_path / "a.safetensors", tmp_path / "a.gguf", "BF16")


def test_another_tokenizer_beside_makes_another_file(state, tmp_path):
    save_file(state, tmp_path / "a.safetensors")
    (tmp_path / "spiece.model").write_bytes(SPIECE.read_bytes())
    settings = {"recipe": "Q8_0", "effort": "fast"}
    convert(tmp_path / "a.safetensors", tmp_path / "a.gguf", **settings)
    assert convert(tmp_path / "a.safetensors", tmp_path / "a.gguf", **settings).reused
    (tmp_path / "spiece.model").write_bytes(SPIECE.read_bytes() + b"\x98\x06\x01")  # an unknown field
    with pytest.raises(QuantError, match="exists, but is not this conversion"):
        convert(tmp_path / "a.safetensors", tmp_path / "a.gguf", **settings)


@pytest.mark.parametrize(
    "damage",
    [
        {SPIECE_KEY: 10**9},
        {SPIECE_KEY: "text"},
        {"tokenizer.ggml.scores": 1.0},
        {"tokenizer.ggml.scores": [0.5]},
        {"tokenizer.ggml.token_type": "text"},
        {"tokenizer.ggml.precompiled_charsmap": 10**9},
        {"tokenizer.ggml.tokens": 1},
        {"tokenizer.ggml.add_space_prefix": "text"},
    ],
    ids=str,
)
def test_damaged_tokenizers_in_a_gguf_are_refused(state, spiece, damage):
    whole = parse_vocabulary(SPIECE.read_bytes(), state["shared.weight"].shape[0])
    with pytest.raises(QuantError):
        sentencepiece_model(whole | damage)
