"""The file of each tensor: newer hosts pin weights on slow disks, and count tensors without a file as such."""

from __future__ import annotations

import os
from collections import Counter

import comfy.ldm.wan.model as wan
import comfy.ops
import comfy.sd
import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from wanquant.ops.loading.diffusion_model import load_diffusion_model
from wanquant.ops.loading.text_encoder import load_text_encoder
from wanquant.quant import convert


def source(tensor):
    return getattr(tensor.untyped_storage(), "_comfy_source_path", None)


@pytest.fixture
def handed(monkeypatch):
    """Count the tensors that the host gets, by file, as newer hosts do."""
    paths = Counter()

    def counting(load):
        def loading(state_dict, *args, **kwargs):
            for part in state_dict if isinstance(state_dict, list) else [state_dict]:
                paths.update(source(tensor) for tensor in part.values())
            return load(state_dict, *args, **kwargs)

        return loading

    for name in ("load_diffusion_model_state_dict", "load_text_encoder_state_dicts"):
        monkeypatch.setattr(comfy.sd, name, counting(getattr(comfy.sd, name)))
    return paths


def test_every_tensor_names_its_file(t2v, handed, tmp_path):
    linked = tmp_path / "linked.gguf"
    linked.symlink_to(t2v[1])
    load_diffusion_model(linked)
    assert handed == {os.path.realpath(t2v[1]): len(load_file(t2v[0]))}


def test_what_is_decoded_as_it_is_loaded_names_its_file_too(t2v, handed, tmp_path, write_gguf):
    state = load_file(t2v[0])
    path = write_gguf(tmp_path / "a.gguf", state, lambda name, t: "Q8_0" if t.shape[-1] % 32 == 0 else "F32")
    load_diffusion_model(path)
    assert handed == {os.path.realpath(path): len(state)}


def test_every_part_of_a_split_file_is_named(t2v, handed, tmp_path):
    state = load_file(t2v[0])
    writer = gguf.GGUFWriter(tmp_path / "wan.gguf", "wan", split_max_tensors=len(state) // 2 + 1)
    for name, tensor in state.items():
        if tensor.ndim == 5:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(tensor.shape))
            tensor = tensor.flatten(2, 3)
        writer.add_tensor(name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    first, second = sorted(tmp_path.glob("wan-*.gguf"))
    load_diffusion_model(first)
    assert handed.keys() == {os.path.realpath(first), os.path.realpath(second)}
    assert handed.total() == len(state)


def test_an_add_ons_tensors_name_the_add_ons_file(handed, tmp_path):
    sizes = {"dim": 256, "ffn_dim": 512, "num_heads": 2, "num_layers": 2, "vace_layers": 2, "vace_in_dim": 96}
    model = wan.VaceWanModel(**sizes, operations=comfy.ops.manual_cast)
    state = {name: torch.zeros(tensor.shape) for name, tensor in model.state_dict().items()}
    module = {name: tensor for name, tensor in state.items() if name.startswith("vace_")}
    save_file(module, tmp_path / "add-on.safetensors")
    save_file({name: t for name, t in state.items() if name not in module}, tmp_path / "base.safetensors")
    base = convert(tmp_path / "base.safetensors", tmp_path / "base.gguf", "Q8_0", effort="fast").path
    load_diffusion_model(base, add_on=tmp_path / "add-on.safetensors")
    assert handed == {
        os.path.realpath(base): len(state) - len(module),
        os.path.realpath(tmp_path / "add-on.safetensors"): len(module),
    }


def test_a_text_encoders_tokenizer_names_its_file_too(llama_file, weights, handed):
    load_text_encoder(llama_file, comfy.sd.CLIPType.WAN)
    assert handed == {os.path.realpath(llama_file): len(weights) + 1}
