"""A checkpoint that prefers another attention in some modules, through conversion, loading, simulation and saving."""

from __future__ import annotations

import json

import comfy.ldm.modules.attention as attention
import pytest
import torch
from safetensors.torch import load_file, save_file

from wanquant.ops.budget.simulator import Simulator
from wanquant.ops.loading.diffusion_model import load_diffusion_model
from wanquant.ops.merged_source import merged_checkpoint
from wanquant.quant import convert
from wanquant.quant.gguf.header import read_header
from wanquant.quant.gguf.provenance import source_metadata

MODULE, PREFERENCE = "blocks.0.self_attn", {"attention": "comfy_kitchen_int8"}


@pytest.fixture
def model(t2v, tmp_path):
    text = torch.tensor(list(json.dumps(PREFERENCE).encode()), dtype=torch.uint8)
    save_file(load_file(t2v[0]) | {f"{MODULE}.comfy_attention.config": text}, tmp_path / "a.safetensors")
    return load_diffusion_model(convert(tmp_path / "a.safetensors", tmp_path / "a.gguf", "Q8_0", effort="fast").path)


def preference(model, name=MODULE):
    return model.get_submodule(name).comfy_attention.config


def test_a_host_without_preferences_loads_the_file(model):
    assert model.model.diffusion_model.blocks[0].self_attn.q.weight is not None


def test_loaded_simulated_and_saved_with_it(model, tmp_path):
    if not hasattr(attention, "ComfyAttention"):
        pytest.skip("this host has no attention preferences")
    transformer = model.model.diffusion_model
    assert preference(transformer) == PREFERENCE
    assert preference(transformer, "blocks.1.self_attn") is None
    assert preference(Simulator.from_patcher(model)._model.diffusion_model) == PREFERENCE
    saved = convert(merged_checkpoint(model, torch.device("cpu")), tmp_path / "b.gguf", "Q8_0", effort="fast").path
    assert source_metadata(read_header(saved).metadata) == {f"comfy_attention.{MODULE}": json.dumps(PREFERENCE)}
    assert preference(load_diffusion_model(saved).model.diffusion_model) == PREFERENCE
