"""umT5 as the host has it, converted to llama.cpp's names with its tokenizer."""

from __future__ import annotations

from pathlib import Path

import comfy.ops
import comfy.text_encoders
import numpy as np
import pytest
import sentencepiece
import torch
from comfy.text_encoders.spiece_tokenizer import SPieceTokenizer
from comfy.text_encoders.t5 import T5
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from wanquant.quant import QuantError, convert, open_gguf
from wanquant.quant.conversion.restore import restore
from wanquant.quant.files.sentencepiece import SPIECE_KEY, parse_vocabulary, sentencepiece_model
from wanquant.quant.inspection.report import inspect
from wanquant.testing.text_encoder_files import NAMINGS, wan_name, write_as_others

SPIECE = Path(comfy.text_encoders.__path__[0]) / "t5_pile_tokenizer" / "tokenizer.model"
CONFIG = {
    **{"d_ff": 512, "d_kv": 64, "d_model": 256, "num_heads": 4, "num_layers": 2, "vocab_size": 32128},
    **{"dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True, "layer_norm_epsilon": 1e-6, "model_type": "umt5"},
}
# (Transformers' name, llama.cpp's)
NAMES = (
    ("shared", "token_embd"),
    ("encoder.final_layer_norm", "enc.output_norm"),
    *(
        (f"encoder.block.{n}.layer.{theirs}", f"enc.blk.{n}.{llama}")
        for n in range(2)
        for theirs, llama in (
            *((f"0.SelfAttention.{letter}", f"attn_{letter}") for letter in "qkvo"),
            ("0.SelfAttention.relative_attention_bias", "attn_rel_b"),
            ("0.layer_norm", "attn_norm"),
            ("1.DenseReluDense.wi_0", "ffn_gate"),
            ("1.DenseReluDense.wi_1", "ffn_up"),
            ("1.DenseReluDense.wo", "ffn_down"),
            ("1.layer_norm", "ffn_norm"),
        )
    ),
)


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    model = T5(CONFIG, torch.float32, "cpu", comfy.ops.manual_cast)
    return {name: torch.randn(value.shape).mul(0.05).bfloat16() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def spiece():
    return torch.frombuffer(bytearray(SPIECE.read_bytes()), dtype=torch.uint8)


@pytest.fixture(scope="module")
def source(state, spiece, tmp_path_factory):
    path = tmp_path_factory.mktemp("t5") / "umt5.safetensors"
    save_file(state | {"spiece_model": spiece}, path)
    return path


def test_the_table_of_names_is_that_of_the_host(state):
    assert {f"{theirs}.weight" for theirs, _ in NAMES} == state.keys()


def check_values(path, state):
    tensors = open_gguf(path).tensors
    assert tensors.keys() == {f"{llama}.weight" for _, llama in NAMES}
    for theirs, llama in NAMES:
        assert torch.equal(tensors[f"{llama}.weight"].dequantize(), state[f"{theirs}.weight"].float())


def test_names_and_values(source, state, tmp_path):
    check_values(convert(source, tmp_path / "a.gguf", "BF16").path, state)


def test_original_names_with_the_tokenizer_beside(state, tmp_path):
    save_file({wan_name(name): value for name, value in state.items()}, tmp_path / "a.safetensors")
    with pytest.raises(QuantError, match=r"has no tokenizer \(tensor spiece_model\).*put spiece\.model into"):
        convert(tmp_path / "a.safetensors", tmp_path / "a.gguf", "BF16")
    (tmp_path / "spiece.model").write_bytes(SPIECE.read_bytes())
    check_values(convert(tmp_path / "a.safetensors", tmp_path / "a.gguf", "BF16").path, state)


def test_a_tied_embedding_and_a_decoder_are_left_out(state, spiece, tmp_path):
    more = {"encoder.embed_tokens.weight": state["shared.weight"].clone(), "lm_head.weight": torch.zeros(2, 2)}
    more |= {"decoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(2, 2), "spiece_model": spiece}
    save_file(state | more, tmp_path / "a.safetensors")
    check_values(convert(tmp_path / "a.safetensors", tmp_path / "a.gguf", "BF16").path, state)


def test_scaled_fp8(state, spiece, tmp_path):
    name = "encoder.block.1.layer.1.DenseReluDense.wo"
    scale = state[f"{name}.weight"].abs().max().float() / 448
    fp8 = (state[f"{name}.weight"].float() / scale).to(torch.float8_e4m3fn)
    more = {f"{name}.weight": fp8, f"{name}.scale_weight": scale, "scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn)}
    save_file(state | more | {"spiece_model": spiece}, tmp_path / "a.safetensors")
    tensors = open_gguf(convert(tmp_path / "a.safetensors", tmp_path / "a.gguf", "F16").path).tensors
    expected = (fp8.float() * scale).half().float()
    assert torch.equal(tensors["enc.blk.1.ffn_down.weight"].dequantize(), expected)


def test_types_of_a_recipe(source, tmp_path):
    report = convert(source, tmp_path / "a.gguf", "Q4_K_M", effort="fast")
    types = {tensor.name: tensor.qtype for tensor in report.tensors}
    assert types["token_embd.weight"] == "Q6_K"
    assert types["enc.blk.0.attn_q.weight"] == "Q4_K"
    assert types["enc.blk.0.attn_v.weight"] == types["enc.blk.1.ffn_down.weight"] == "Q6_K"
    assert types["enc.blk.0.attn_rel_b.weight"] == types["enc.output_norm.weight"] == "F32"
    assert inspect(report.path).kind == "T5 text encoder"


def test_metadata_is_llama_cpps(source, tmp_path):
    fields = GGUFReader(convert(source, tmp_path / "a.gguf", "Q8_0", effort="fast").path).fields
    values = {key: field.contents() for key, field in fields.items() if field.types[0].name != "ARRAY"}
    assert values["general.architecture"] == "t5encoder"
    assert values["t5encoder.embedding_length"] == 256
    assert values["t5encoder.feed_forward_length"] == 512
    assert values["t5encoder.block_count"] == 2
    assert values["t5encoder.attention.head_count"] == 4
    assert values["t5encoder.attention.key_length"] == 64
    assert values["t5encoder.attention.relative_buckets_count"] == 32


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


def test_comfyui_gguf_reads_the_tokenizer(source, tmp_path):
    """Its keys and types; the padding of umT5, whose vocabulary has one, is read too.

    Source: city96/ComfyUI-GGUF loader.py gguf_clip_loader, gguf_tokenizer_loader @ 795e451.
    """
    fields = GGUFReader(convert(source, tmp_path / "a.gguf", "Q8_0", effort="fast").path).fields
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spiece_model": torch.arange(99, dtype=torch.uint8)}, "tokenizer: 99 bytes .*expected a SentencePiece model"),
        ({"spiece_model": torch.zeros(0, dtype=torch.uint8)}, "tokenizer: 0 pieces, expected 1 to"),
        ({"shared.weight": torch.zeros(100, 256)}, "pieces, expected 1 to 100, the rows of the embedding"),
        (
            {"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": None},
            "attn_rel_b.weight is missing",
        ),
    ],
)
def test_bad_encoders(source, tmp_path, changes, message):
    tensors = load_file(source) | changes
    save_file({name: value for name, value in tensors.items() if value is not None}, tmp_path / "a.safetensors")
    with pytest.raises(QuantError, match=message):
        convert(tmp_path / "a.safetensors", tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_restored_encoder_is_the_hosts_again(source, state, spiece, tmp_path):
    gguf = convert(source, tmp_path / "a.gguf", "BF16").path
    restored = load_file(restore(gguf, tmp_path / "a.safetensors").path)
    assert restored.keys() == state.keys() | {"spiece_model"}
    assert torch.equal(restored.pop("spiece_model"), spiece)
    for name, value in restored.items():
        assert torch.equal(value.float(), state[name].float())


def in_float32(state):
    return {name: value.float() for name, value in state.items()}


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


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("suffix", ["safetensors", "gguf"])
def test_names_that_other_tools_write(state, spiece, tmp_path, naming, suffix):
    path = tmp_path / f"a.{suffix}"
    renamed = {NAMINGS[naming](name): value for name, value in state.items()}
    if suffix == "gguf":
        write_as_others(path, in_float32(renamed), SPIECE.read_bytes())
    else:
        save_file(renamed | {"spiece_model": spiece}, path)
    check_values(convert(path, tmp_path / "b.gguf", "BF16").path, state)


@pytest.mark.parametrize(
    "name",
    ["encoder.block.1.layer.1.DenseReluDense.wo", "encoder.final_layer_norm", "encoder.block.1.layer.0.layer_norm"],
)
@pytest.mark.parametrize("suffix", ["safetensors", "gguf"])
def test_an_incomplete_encoder_is_refused(state, spiece, tmp_path, name, suffix):
    path, part = tmp_path / f"a.{suffix}", {n: value for n, value in state.items() if n != f"{name}.weight"}
    if suffix == "gguf":
        write_as_others(path, in_float32(part), SPIECE.read_bytes())
    else:
        save_file(part | {"spiece_model": spiece}, path)
    with pytest.raises(QuantError, match=r"incomplete: tensor .* is missing, expected a complete model"):
        convert(path, tmp_path / "b.gguf", "BF16")


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
