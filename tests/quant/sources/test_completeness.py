"""Refusal of files without all the tensors that their model must have."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from wanquant.quant import QuantError
from wanquant.quant.conversion.batch import list_targets
from wanquant.quant.conversion.convert import convert
from wanquant.quant.sources.completeness import check_complete, few_blocks, missing_names
from wanquant.testing.tiny_wan import write_tiny_wan


@pytest.fixture
def state(tmp_path):
    return load_file(write_tiny_wan(tmp_path / "whole.safetensors", layers=3, dim=128, ffn_dim=128))


def refused(tmp_path, tensors, message, name="part.safetensors"):
    save_file(tensors, tmp_path / name)
    for convert_it in (
        lambda: convert(tmp_path / name, tmp_path / "a.gguf", "Q8_0"),
        lambda: list_targets(tmp_path / name, tmp_path / "a.gguf", ["Q8_0"]),
    ):
        with pytest.raises(QuantError, match=message):
            convert_it()
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize("name", ["blocks.1.ffn.2.weight", "patch_embedding.bias", "time_projection.1.weight"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_one_tensor(tmp_path, state, name, prefix):
    tensors = {prefix + key: value for key, value in state.items() if key != name}
    message = (
        rf"part\.safetensors: incomplete: tensor {re.escape(name)} is missing, expected a complete model; download"
    )
    refused(tmp_path, tensors, message)


def test_the_last_shard_under_another_name(tmp_path, state):
    last = {key: value for key, value in state.items() if key.startswith(("blocks.2.", "head."))}
    count = len(state) - len(last)
    refused(tmp_path, last, rf"incomplete: {count} tensors are missing, the first is patch_embedding\.weight")


def test_the_first_shard_under_another_name(tmp_path, state):
    first = {key: value for key, value in state.items() if not key.startswith(("blocks.2.", "head."))}
    refused(tmp_path, first, r"incomplete: tensor head\.modulation is missing")


def test_a_whole_block(tmp_path, state):
    tensors = {key: value for key, value in state.items() if not key.startswith("blocks.1.")}
    refused(tmp_path, tensors, r"incomplete: 27 tensors are missing, the first is blocks\.1\.modulation")


def test_unknown_names_that_most_blocks_have(state):
    """A name that an add-on puts into some blocks is not one of them."""
    extra = [f"blocks.{number}.{name}" for number in (0, 2) for name in ("new.weight", "cross_attn.ip_adapter.weight")]
    assert missing_names([*state, *extra], "wan") == ["blocks.1.new.weight"]
    assert missing_names([*state, extra[0]], "wan") == []


@pytest.mark.parametrize("number", [30_000_000, 999_999_999])
def test_large_block_numbers_cost_nothing(state, tmp_path, number):
    missing = missing_names([*state, f"blocks.{number}.modulation"], "wan")
    assert missing[0] == "blocks.3.modulation"
    assert len(missing) < 100_000
    with pytest.raises(QuantError) as raised:
        check_complete(tmp_path, [*state, f"blocks.{number}.modulation"], "wan")
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize(("width", "blocks", "warned"), [(1536, 29, [True]), (1536, 30, []), (5120, 30, [True])])
def test_fewer_blocks_than_published(tmp_path, width, blocks, warned):
    tensors = {"patch_embedding.bias": torch.zeros(width)}
    tensors |= {f"blocks.{number}.modulation": torch.zeros(1) for number in range(blocks)}
    assert [f": {blocks} blocks, expected " in warning for warning in few_blocks(tmp_path, tensors, "wan")] == warned


def test_a_shortened_model_is_converted_with_a_warning(tmp_path):
    source = write_tiny_wan(tmp_path / "a.safetensors", layers=1, dim=1536, ffn_dim=256)
    (warning,) = convert(source, tmp_path / "a.gguf", "Q8_0", effort="fast").warnings
    assert warning.startswith(f"{source}: 1 block, expected 30 ")


def test_add_on_alone(tmp_path):
    names = ("vace_patch_embedding.weight", "vace_patch_embedding.bias", "ref_conv.weight", "ref_conv.bias")
    assert missing_names(names, "wan", add_on=True) == []
    tensors = {name: torch.zeros(32, 32) for name in names if name != "ref_conv.bias"}
    refused(tmp_path, tensors, r"incomplete: tensor ref_conv\.bias is missing")


def t5_names(blocks):
    layers = ("attn_q", "attn_k", "attn_v", "attn_o", "attn_norm", "attn_rel_b", "ffn_norm", "ffn_gate", "ffn_up")
    names = [f"enc.blk.{n}.{layer}.weight" for n in range(blocks) for layer in (*layers, "ffn_down")]
    return ["token_embd.weight", *names, "enc.output_norm.weight"]


def test_text_encoder():
    names = t5_names(4)
    assert missing_names(names, "t5encoder") == []
    for name in names:
        assert missing_names([other for other in names if other != name], "t5encoder") == [name]
    # T5 has relative positions in its first block only, umT5 in all.
    t5 = [name for name in names if "attn_rel_b" not in name or ".0." in name]
    assert missing_names(t5, "t5encoder") == []
