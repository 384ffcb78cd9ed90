"""umT5 as the host has it, converted to llama.cpp's names and back."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from wanquant.quant import QuantError, convert, open_gguf
from wanquant.quant.conversion.restore import restore
from wanquant.quant.inspection.report import inspect
from wanquant.testing.text_encoder_files import NAMINGS, write_as_others
from wanquant.tests.ops.text_encoder_source.umt5 import NAMES, SPIECE, check_values, in_float32


def test_the_table_of_names_is_that_of_the_host(state):
    assert {f"{theirs}.weight" for theirs, _ in NAMES} == state.keys()


def test_names_and_values(source, state, tmp_path):
    check_values(convert(source, tmp_path / "a.gguf", "BF16").path, state)


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


def test_metadata_is_llama_cpps(fields):
    values = {key: field.contents() for key, field in fields.items() if field.types[0].name != "ARRAY"}
    assert values["general.architecture"] == "t5encoder"
    assert values["t5encoder.embedding_length"] == 256
    assert values["t5encoder.feed_forward_length"] == 512
    assert values["t5encoder.block_count"] == 2
    assert values["t5encoder.attention.head_count"] == 4
    assert values["t5encoder.attention.key_length"] == 64
    assert values["t5encoder.attention.relative_buckets_count"] == 32


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
