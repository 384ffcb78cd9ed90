"""Attention preferences: tensors of a checkpoint become metadata of a GGUF, and tensors again."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from wanquant.quant import QuantError, convert, open_gguf
from wanquant.quant.conversion.restore import restore
from wanquant.quant.gguf.provenance import source_metadata
from wanquant.quant.sources.attention import preference_tensors
from wanquant.quant.sources.checkpoint import open_checkpoint
from wanquant.testing.tiny_wan import write_tiny_wan

NAME = "blocks.0.self_attn.comfy_attention.config"
INT8 = {"attention": "comfy_kitchen_int8"}


def text(value: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


@pytest.fixture
def state(tmp_path):
    return load_file(write_tiny_wan(tmp_path / "plain.safetensors", layers=1))


@pytest.mark.parametrize("preference", [INT8, [INT8, {"attention": "comfy_kitchen_sol", "tau": 0.9}]])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_preferences_survive_conversion_and_restoration(prefix, preference, state, tmp_path):
    stored = {prefix + name: tensor for name, tensor in (state | {NAME: text(preference)}).items()}
    save_file(stored, tmp_path / "a.safetensors", metadata={"config": "{}"})
    gguf = convert(tmp_path / "a.safetensors", tmp_path / "a.gguf", "Q8_0", effort="fast").path
    assert open_gguf(gguf).tensors.keys() == state.keys(), "other loaders refuse unknown tensors"
    metadata = source_metadata(open_gguf(gguf).metadata)
    (tensor,) = preference_tensors(metadata).values()
    assert list(preference_tensors(metadata)) == [NAME]
    assert json.loads(tensor.numpy().tobytes()) == preference
    with open_checkpoint(gguf) as again:
        assert again.metadata == metadata
    restored = load_file(restore(gguf, tmp_path / "b.safetensors").path)
    assert torch.equal(restored[NAME], text(preference))
    assert restored.keys() == state.keys() | {NAME}


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(3, dtype=torch.uint8), "is not JSON"),
        (text("int8"), "expected a JSON object"),
        (torch.ones(4), "16 bytes of F32, expected .* in 1 to 65536 bytes of U8"),
        (text("x" * 70000), "70002 bytes of U8"),
        (torch.full((9,), 255, dtype=torch.uint8), "is not JSON"),
        (torch.tensor(list(b"[" * 9000), dtype=torch.uint8), "is not JSON"),
    ],
    ids=["zeros", "string", "floats", "long", "not UTF-8", "deep"],
)
def test_malformed_preferences_are_refused(tensor, message, state, tmp_path):
    save_file(state | {NAME: tensor}, tmp_path / "a.safetensors")
    with pytest.raises(QuantError, match=rf"tensor {NAME}: .*{message}.*; the file is damaged, download it again$"):
        open_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize("value", ["zzz", "5", "[" * 9000, json.dumps(["x" * 70_000])])
def test_preferences_in_metadata_that_the_host_cannot_read(value, state, tmp_path):
    """Texts of such a name in safetensors are ordinary metadata. A GGUF that has them is not restored."""
    with pytest.raises(QuantError, match=r"metadata comfy_attention\.blocks\.0\.x"):
        preference_tensors({"comfy_attention.blocks.0.x": value})
    save_file(state, tmp_path / "a.safetensors", metadata={"comfy_attention.blocks.0.x": value, "config": "{}"})
    gguf = convert(tmp_path / "a.safetensors", tmp_path / "a.gguf", "Q8_0", effort="fast").path
    assert source_metadata(open_gguf(gguf).metadata) == {"config": "{}"}
    assert load_file(restore(gguf, tmp_path / "b.safetensors").path).keys() == state.keys()
