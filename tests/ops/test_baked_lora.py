"""LoRAs that the command line adds to weights: the same bytes as Save Model's, whose LoRAs the host loads."""

from __future__ import annotations

import comfy.sd
import pytest
import torch
from safetensors.torch import load_file, save_file

from wanquant.ops.merged_source import merged_checkpoint
from wanquant.ops.packed.lora_names import register_lora_names
from wanquant.quant import open_gguf
from wanquant.quant.conversion.convert import convert
from wanquant.quant.native.registry import NATIVE
from wanquant.quant.sources.baked_lora import LoRA
from wanquant.quant.sources.checkpoint import open_checkpoint
from wanquant.quant.units import counted
from wanquant.tests.ops.packed.patching import CPU, lora, with_lora
from wanquant.tests.ops.packed.test_lora_names import ENDS, LAYERS, renamed

register_lora_names()

DIFFERENCES = {
    "blocks.0.cross_attn.q.diff": (256, 256),
    "blocks.0.cross_attn.q.diff_b": (256,),
    "blocks.1.norm3.w_norm": (256,),
    "blocks.1.norm3.b_norm": (256,),
    "blocks.0.modulation.diff": (1, 6, 256),
}
# The host makes this layer in float32, whatever the file has.
IN_FLOAT32 = {"patch_embedding.weight", "patch_embedding.bias"}


@pytest.fixture(scope="module")
def dense(t2v):
    """Return the host's model of the checkpoint, in the checkpoint's dtype."""
    return comfy.sd.load_diffusion_model(str(t2v[0]), {"dtype": torch.bfloat16})


@pytest.fixture(scope="module")
def tensors(state):
    generator = torch.Generator().manual_seed(3)
    random = {f"diffusion_model.{n}": torch.randn(shape, generator=generator) for n, shape in DIFFERENCES.items()}
    return lora(state, bias=True) | random


def assert_same_values(dense, source, tensors, path, strength=0.7):
    """Compare the sums with those of the host's own loader and patcher."""
    save_file(tensors, path)
    model = with_lora(dense, load_file(path), strength)
    assert model.patches
    with merged_checkpoint(model, CPU) as expected, open_checkpoint(source, loras=[LoRA(path, strength)]) as found:
        patched = {key.removeprefix("diffusion_model.") for key in model.patches}
        assert f"baked into {counted(len(patched), 'tensor')}" in found.notes[0]
        for name, tensor in expected.tensors.items():
            assert found.tensors[name].dtype == tensor.dtype or name in IN_FLOAT32
            assert torch.equal(found.tensors[name].read().float(), tensor.read().float()), name
    return found


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("ends", ENDS)
def test_every_naming_gives_the_hosts_sums(dense, t2v, state, layers, ends, tmp_path):
    found = assert_same_values(
        dense, t2v[0], renamed(lora(state, bias=True), LAYERS[layers], ENDS[ends]), tmp_path / "a.safetensors"
    )
    assert not [warning for warning in found.warnings if "left out" in warning]


@pytest.mark.parametrize("layers", [None, *LAYERS])
def test_differences(dense, t2v, tensors, layers, tmp_path):
    named = tensors if layers is None else renamed(tensors, LAYERS[layers], {})
    assert_same_values(dense, t2v[0], named, tmp_path / "a.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("strength", [1.0, -0.25, 0.0])
def test_dtypes_and_strengths(dense, t2v, tensors, dtype, strength, tmp_path):
    named = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    assert_same_values(dense, t2v[0], named, tmp_path / "a.safetensors", strength)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bias_of_pefts_factor(dense, t2v, state, dtype, tmp_path):
    stem = "diffusion_model.blocks.0.ffn.0"
    named = {name: tensor.to(dtype) for name, tensor in lora(state, rank=3).items()}
    bias = torch.randn(state["blocks.0.ffn.0.bias"].shape).to(dtype)
    assert_same_values(dense, t2v[0], named | {f"{stem}.lora_B.bias": bias}, tmp_path / "a.safetensors")


def test_a_difference_replaces_the_factors_of_its_weight_as_in_the_host(dense, t2v, state, tmp_path):
    difference = {"diffusion_model.blocks.0.ffn.0.diff": torch.randn(state["blocks.0.ffn.0.weight"].shape)}
    assert_same_values(dense, t2v[0], lora(state) | difference, tmp_path / "a.safetensors")


def test_convolutions(dense, t2v, tmp_path):
    stem, kernel = "diffusion_model.patch_embedding", (16, 1, 2, 2)
    factors = {f"{stem}.lora_down.weight": torch.randn(4, *kernel)}
    factors[f"{stem}.lora_up.weight"] = torch.randn(256, 4, 1, 1, 1)
    assert_same_values(dense, t2v[0], factors, tmp_path / "a.safetensors")


@pytest.mark.parametrize("recipe", ["Q4_K_M", "Q8_0", "BF16", *NATIVE])
def test_bytes_equal_save_model(dense, t2v, tensors, state, recipe, tmp_path):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    save_file(tensors, first)
    save_file(lora(state, seed=1), second)
    suffix = ".safetensors" if recipe in NATIVE else ".gguf"
    model = with_lora(with_lora(dense, load_file(first), 0.8), load_file(second), -0.5)
    saved = convert(merged_checkpoint(model, CPU), tmp_path / f"saved{suffix}", recipe)
    baked = convert(t2v[0], tmp_path / f"baked{suffix}", recipe, loras=[(first, 0.8), f"{second}:-0.5"])
    assert any("LoRAs of MODEL" in note for note in saved.notes)
    if recipe in NATIVE:
        expected, found = load_file(saved.path), load_file(baked.path)
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            if name in IN_FLOAT32:
                assert torch.equal(found[name].float(), tensor.float())
                continue
            assert found[name].dtype == tensor.dtype
            ours, theirs = (t.reshape(-1).view(torch.uint8) for t in (found[name], tensor))
            assert torch.equal(ours, theirs), name
        return
    expected, found = open_gguf(saved.path).tensors, open_gguf(baked.path).tensors
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert found[name].qtype == tensor.qtype
        assert torch.equal(found[name].data, tensor.data), name
