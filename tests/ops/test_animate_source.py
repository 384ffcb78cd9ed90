"""Wan Animate in Diffusers' layout: split attention, flat biases, no constants."""

from __future__ import annotations

import re

import comfy.ops
import pytest
import torch
from comfy.ldm.wan.model_animate import AnimateWanModel
from safetensors.torch import save_file

from wanquant.ops.loading.diffusion_model import load_diffusion_model
from wanquant.ops.packed.layout import is_packed
from wanquant.quant import QuantError, convert, open_gguf
from wanquant.quant.sources.checkpoint import open_checkpoint

CONVOLUTIONS = r"motion_encoder\.enc\.net_app\.convs\."
# (in ComfyUI, in Diffusers); the first that matches counts.
NAMES = (
    (CONVOLUTIONS + r"0\.0\.", r"motion_encoder.conv_in."),
    (CONVOLUTIONS + r"0\.1\.", r"motion_encoder.conv_in.act_fn."),
    (CONVOLUTIONS + r"8\.", r"motion_encoder.conv_out."),
    (CONVOLUTIONS + r"(\d)\.conv1\.0\.", r"motion_encoder.res_blocks.-\1.conv1."),
    (CONVOLUTIONS + r"(\d)\.conv1\.1\.", r"motion_encoder.res_blocks.-\1.conv1.act_fn."),
    (CONVOLUTIONS + r"(\d)\.conv2\.1\.", r"motion_encoder.res_blocks.-\1.conv2."),
    (CONVOLUTIONS + r"(\d)\.conv2\.2\.", r"motion_encoder.res_blocks.-\1.conv2.act_fn."),
    (CONVOLUTIONS + r"(\d)\.skip\.1\.", r"motion_encoder.res_blocks.-\1.conv_skip."),
    (r"motion_encoder\.enc\.fc\.", "motion_encoder.motion_network."),
    (r"motion_encoder\.dec\.direction\.weight", "motion_encoder.motion_synthesis_weight"),
    (r"face_encoder\.(conv\w+)\.conv\.", r"face_encoder.\1."),
    (r"face_adapter\.fuser_blocks\.(\d)\.([qk])_norm\.", r"face_adapter.\1.norm_\2."),
    (r"face_adapter\.fuser_blocks\.(\d)\.linear1_(\w+)\.", r"face_adapter.\1.to_\2."),
    (r"face_adapter\.fuser_blocks\.(\d)\.linear2\.", r"face_adapter.\1.to_out."),
    (r"time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"time_projection\.1\.", "condition_embedder.time_proj."),
    (r"img_emb\.proj\.0\.", "condition_embedder.image_embedder.norm1."),
    (r"img_emb\.proj\.1\.", "condition_embedder.image_embedder.ff.net.0.proj."),
    (r"img_emb\.proj\.3\.", "condition_embedder.image_embedder.ff.net.2."),
    (r"img_emb\.proj\.4\.", "condition_embedder.image_embedder.norm2."),
    (r"head\.modulation", "scale_shift_table"),
    (r"head\.head\.", "proj_out."),
    (r"(blocks\.\d+)\.modulation", r"\1.scale_shift_table"),
    (r"(blocks\.\d+)\.norm3\.", r"\1.norm2."),
    (r"(blocks\.\d+)\.ffn\.0\.", r"\1.ffn.net.0.proj."),
    (r"(blocks\.\d+)\.ffn\.2\.", r"\1.ffn.net.2."),
    (r"(blocks\.\d+)\.self_attn\.([qkv])\.", r"\1.attn1.to_\2."),
    (r"(blocks\.\d+)\.cross_attn\.([qkv])\.", r"\1.attn2.to_\2."),
    (r"(blocks\.\d+)\.self_attn\.o\.", r"\1.attn1.to_out.0."),
    (r"(blocks\.\d+)\.cross_attn\.o\.", r"\1.attn2.to_out.0."),
    (r"(blocks\.\d+)\.cross_attn\.([kv])_img\.", r"\1.attn2.add_\2_proj."),
    (r"(blocks\.\d+)\.cross_attn\.norm_k_img\.", r"\1.attn2.norm_added_k."),
    (r"(blocks\.\d+)\.self_attn\.norm_", r"\1.attn1.norm_"),
    (r"(blocks\.\d+)\.cross_attn\.norm_", r"\1.attn2.norm_"),
)


def in_diffusers(name, value):
    """The names and values that one tensor has there."""
    pattern, replacement = next((pair for pair in NAMES if re.match(pair[0], name)), ("", ""))
    theirs = re.sub(pattern, replacement, name, count=1)
    theirs = re.sub(r"blocks\.-(\d)", lambda match: f"blocks.{int(match[1]) - 1}", theirs)
    if name.endswith(".kernel"):
        return {}
    if ".to_kv." in theirs:
        key, half = value.chunk(2)
        return {theirs.replace("to_kv", "to_k"): key.clone(), theirs.replace("to_kv", "to_v"): half.clone()}
    return {theirs: value.flatten() if "act_fn" in theirs else value}


@pytest.fixture(scope="module")
def state(tiny_wan):
    sizes = {"dim": 256, "ffn_dim": 512, "num_heads": 2, "num_layers": 5, "in_dim": 36}
    model = AnimateWanModel(**sizes, dtype=torch.float32, operations=comfy.ops.manual_cast)
    generator = torch.Generator().manual_seed(0)
    return {
        key: value if key.endswith(".kernel") else tiny_wan["random_tensor"](key, tuple(value.shape), generator)
        for key, value in model.state_dict().items()
    }


def test_values_and_shapes(state, tmp_path):
    theirs = {key: value for name in state for key, value in in_diffusers(name, state[name]).items()}
    save_file(theirs, tmp_path / "a.safetensors")
    with open_checkpoint(tmp_path / "a.safetensors") as checkpoint:
        assert checkpoint.tensors.keys() == {name for name in state if not name.endswith(".kernel")}
        for name, tensor in checkpoint.tensors.items():
            value = tensor.read()
            assert torch.equal(value.view(tensor.shape), state[name])
            middle = len(value) // 2
            assert torch.equal(tensor.read(middle - 1, middle + 1), value[middle - 1 : middle + 1])

    packed = load_diffusion_model(convert(tmp_path / "a.safetensors", tmp_path / "a.gguf", "Q8_0", effort="fast").path)
    assert type(packed.model.model_config).__name__ == "WAN22_Animate"
    weights = packed.model.diffusion_model.state_dict()
    assert weights.keys() == state.keys()
    for name, value in weights.items():
        if name.endswith(".kernel"):
            torch.testing.assert_close(value.float(), state[name])
    joined = open_gguf(tmp_path / "a.gguf").tensors["face_adapter.fuser_blocks.0.linear1_kv.weight"].dequantize()
    torch.testing.assert_close(joined, state["face_adapter.fuser_blocks.0.linear1_kv.weight"], rtol=0, atol=0.01)


def test_a_half_that_is_missing(state, tmp_path):
    theirs = {key: value for name in state for key, value in in_diffusers(name, state[name]).items()}
    del theirs["face_adapter.0.to_v.weight"]
    save_file(theirs, tmp_path / "a.safetensors")
    with pytest.raises(QuantError, match=r"linear1_k\.weight: its counterpart is missing"):
        open_checkpoint(tmp_path / "a.safetensors")


def test_gguf_in_diffusers_names_loads(state, tmp_path, write_gguf):
    theirs = {key: value for name in state for key, value in in_diffusers(name, state[name]).items()}

    def types(name, tensor):
        return "Q8_0" if tensor.ndim == 2 and tensor.shape[1] % 32 == 0 else "F32"

    path = write_gguf(tmp_path / "a.gguf", theirs, types, prefix="transformer.")
    packed = load_diffusion_model(path, dtype=torch.float32)
    assert type(packed.model.model_config).__name__ == "WAN22_Animate"
    weights = packed.model.diffusion_model.state_dict()
    assert weights.keys() == state.keys()
    assert is_packed(weights["face_adapter.fuser_blocks.0.linear1_kv.weight"])
    for name, value in weights.items():
        torch.testing.assert_close(value.dequantize() if is_packed(value) else value, state[name], rtol=0, atol=0.05)

    del theirs["face_adapter.0.to_v.weight"]
    with pytest.raises(QuantError, match=r"linear1_k\.weight: its counterpart is missing"):
        load_diffusion_model(write_gguf(tmp_path / "b.gguf", theirs, types))
    theirs["face_adapter.0.to_v.weight"] = state["face_adapter.fuser_blocks.0.linear1_kv.weight"][256:]
    mixed = write_gguf(tmp_path / "c.gguf", theirs, lambda n, t: "F16" if "to_v" in n else types(n, t))
    with pytest.raises(QuantError, match="expected the same type"):
        load_diffusion_model(mixed)
