"""InfiniteTalk from GGUF as the host's MODEL_PATCH, against the host's own loader."""

from __future__ import annotations

import comfy.model_management
import comfy.ops
import folder_paths
import pytest
import torch
from comfy.ldm.wan.model_multitalk import MultiTalkCrossAttnPatch
from comfy_extras.nodes_model_patch import ModelPatchLoader, MultiTalkModelPatch
from safetensors.torch import load_file, save_file

from wanquant.ops.loading.diffusion_model import load_diffusion_model
from wanquant.ops.loading.model_patch import load_model_patch
from wanquant.ops.packed.layout import is_packed
from wanquant.quant import QuantError
from wanquant.quant.conversion.convert import convert

DIM, LAYERS = 40 * 32, 40  # The host's class has 40 heads and 40 blocks.


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    model = MultiTalkModelPatch(intermediate_dim=32, in_dim=DIM, out_dim=64, operations=comfy.ops.manual_cast)
    generator = torch.Generator().manual_seed(0)
    state = {
        name: (torch.randn(value.shape, generator=generator) * value.shape[-1] ** -0.5).bfloat16()
        for name, value in model.state_dict().items()
    }
    path = tmp_path_factory.mktemp("talking") / "talking.safetensors"
    save_file(state, path)
    return path


@pytest.fixture(scope="module")
def gguf(source):
    return convert(source, source.with_suffix(".gguf"), "Q8_0", effort="fast").path


def outputs(patcher):
    comfy.model_management.load_models_gpu([patcher])
    model, generator = patcher.model, torch.Generator().manual_seed(1)
    first = torch.randn(1, 1, 5, 12, 768, generator=generator)
    later = torch.randn(1, 2, 8, 12, 768, generator=generator)
    x = torch.randn(1, 3 * 4, DIM, generator=generator)
    with torch.inference_mode():
        audio = model.audio_proj(first, later)
        audio = torch.cat(audio.split(1), dim=2)
        talked = model.blocks[7].audio_cross_attn(model.blocks[7].norm_x(x), audio, shape=(3, 2, 2))
    return audio, talked


def test_layers_compute_what_the_host_s_do(source, gguf, monkeypatch, sqnr):
    monkeypatch.setattr(folder_paths, "get_full_path_or_raise", lambda *_: str(source))
    (expected,) = ModelPatchLoader().load_model_patch("talking.safetensors")
    patcher = load_model_patch(gguf)
    assert patcher.model.state_dict().keys() == expected.model.state_dict().keys()
    assert is_packed(patcher.model.blocks[0].audio_cross_attn.q_linear.weight)
    for ours, theirs in zip(outputs(patcher), outputs(expected), strict=True):
        assert ours.shape == theirs.shape
        assert sqnr(theirs, ours) > 35


def test_attributes_are_those_that_the_host_s_nodes_use(gguf):
    patch = load_model_patch(gguf).model
    assert patch.audio_proj.seq_len == 5
    assert len(patch.blocks) == LAYERS


def test_clone_shares_the_model(gguf):
    patcher = load_model_patch(gguf)
    assert patcher.clone().model is patcher.model


def test_other_files_are_refused(t2v, gguf, source, tmp_path, write_gguf):
    with pytest.raises(QuantError, match=r"t2v\.gguf: not InfiniteTalk or MultiTalk"):
        load_model_patch(t2v[1])
    with pytest.raises(QuantError, match="not a Wan model"):
        load_model_patch(write_gguf(tmp_path / "a.gguf", {"x.weight": torch.zeros(32, 32)}, lambda *_: "F32"))


@pytest.mark.parametrize("broken", ["blocks.3.norm_x.bias", "audio_proj.proj3.weight"])
def test_incomplete_file_is_refused(source, tmp_path, broken):
    state = load_file(source)
    del state[broken]
    save_file(state, tmp_path / "a.safetensors")
    path = convert(tmp_path / "a.safetensors", tmp_path / "a.gguf", "Q8_0", effort="fast").path
    with pytest.raises(QuantError, match=rf"1 tensor is missing \({broken}"):
        load_model_patch(path)


def test_tensor_of_another_size_is_refused(source, tmp_path):
    state = load_file(source)
    state["blocks.3.audio_cross_attn.proj.weight"] = torch.zeros(32, DIM)
    save_file(state, tmp_path / "a.safetensors")
    path = convert(tmp_path / "a.safetensors", tmp_path / "a.gguf", "Q8_0", effort="fast").path
    with pytest.raises(QuantError, match=r"a\.gguf: .*blocks\.3\.audio_cross_attn\.proj\.weight: shape"):
        load_model_patch(path)


def test_it_changes_a_model_as_the_host_s_own_does(source, gguf, tiny_wan, tmp_path, monkeypatch, sqnr):
    base = tiny_wan["write_tiny_wan"](tmp_path / "base.safetensors", dim=DIM, ffn_dim=256, layers=2)
    model = load_diffusion_model(convert(base, tmp_path / "base.gguf", "Q8_0", effort="fast").path, dtype=torch.float32)
    monkeypatch.setattr(folder_paths, "get_full_path_or_raise", lambda *_: str(source))
    (dense,) = ModelPatchLoader().load_model_patch("talking.safetensors")
    generator = torch.Generator().manual_seed(2)
    x, text = (torch.randn(shape, generator=generator) for shape in [(1, 16, 3, 8, 8), (1, 7, 4096)])
    audio = torch.randn(1, 3, 32, 64, generator=generator)

    def velocity(patch):
        patched = model.clone()
        if patch is not None:
            patched.set_model_patch(MultiTalkCrossAttnPatch(patch), "attn2_patch")
        comfy.model_management.load_models_gpu([patched, *([] if patch is None else [patch])])
        options = patched.model_options.get("transformer_options", {}) | {"audio_embeds": audio}
        with torch.inference_mode():
            return patched.model.diffusion_model(x, torch.tensor([500.0]), text, transformer_options=options)

    expected, without = velocity(dense), velocity(None)
    assert sqnr(expected, velocity(load_model_patch(gguf))) > 35
    assert sqnr(expected, without) < 20
