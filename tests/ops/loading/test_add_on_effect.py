"""Add-ons of which ComfyUI's model takes nothing: refused, with what takes them, and not merged into a file."""

from __future__ import annotations

from contextlib import suppress

import comfy.ldm.wan.model as wan
import comfy.ops
import pytest
import torch
from safetensors.torch import save_file

from wanquant.ops.loading.diffusion_model import load_diffusion_model
from wanquant.quant import QuantError, convert
from wanquant.quant.sources.add_ons import find_without_layers, part_of_add_on


def _talking():
    return {
        "audio_proj.proj1.weight": torch.zeros(64, 32),
        "audio_proj.norm.weight": torch.zeros(32),
        "blocks.0.audio_cross_attn.proj.weight": torch.zeros(256, 256),
        "blocks.1.norm_x.weight": torch.zeros(256),
    }


WITHOUT_LAYERS = {
    "InfiniteTalk": _talking(),
    "FantasyTalking": {
        "proj_model.proj.weight": torch.zeros(64, 32),
        "blocks.0.cross_attn.k_proj.weight": torch.zeros(256, 64),
        "blocks.0.cross_attn.v_proj.weight": torch.zeros(256, 64),
    },
    "Lynx": {
        "blocks.0.self_attn.ref_adapter.to_k_ref.weight": torch.zeros(256, 256),
        "blocks.1.cross_attn.ip_adapter.to_v_ip.weight": torch.zeros(256, 256),
    },
    "MTV Crafter": {"blocks.0.motion_attn.q.weight": torch.zeros(256, 256)},
}


@pytest.mark.parametrize("whose", WITHOUT_LAYERS)
@pytest.mark.parametrize("suffix", ["safetensors", "gguf"])
def test_add_on_without_effect_is_refused_at_loading(t2v, tmp_path, whose, suffix):
    add_on = tmp_path / "add-on.safetensors"
    save_file(WITHOUT_LAYERS[whose], add_on)
    if suffix == "gguf":  # which it may still become
        add_on = convert(add_on, tmp_path / "add-on.gguf", "Q8_0", effort="fast").path
        with pytest.raises(QuantError, match=rf"an add-on for a Wan model.*tensors? of {whose}"):
            load_diffusion_model(add_on)
    count = len(WITHOUT_LAYERS[whose])
    with pytest.raises(
        QuantError,
        match=rf"{add_on.name}: {count} of {count} tensors? would have no effect: ComfyUI's WanModel has no.*{whose}",
    ):
        load_diffusion_model(t2v[1], add_on=add_on)


@pytest.mark.parametrize("whose", WITHOUT_LAYERS)
def test_add_on_without_effect_is_not_merged(t2v, tmp_path, whose):
    save_file(WITHOUT_LAYERS[whose], tmp_path / "add-on.safetensors")
    with pytest.raises(QuantError, match=rf"add-on\.safetensors: {len(WITHOUT_LAYERS[whose])} tensors? of {whose}"):
        convert(t2v[0], tmp_path / "merged.gguf", "Q8_0", modules=[tmp_path / "add-on.safetensors"])
    assert not (tmp_path / "merged.gguf").exists()


def test_message_names_what_takes_infinitetalk(t2v, tmp_path):
    save_file(_talking(), tmp_path / "add-on.safetensors")
    with pytest.raises(
        QuantError, match=r"MODEL_PATCH.*Load Model Patch \(GGUF\).*models/model_patches.*WanInfiniteTalkToVideo"
    ):
        load_diffusion_model(t2v[1], add_on=tmp_path / "add-on.safetensors")


def _vace():
    model = wan.VaceWanModel(
        dim=256,
        ffn_dim=512,
        num_heads=2,
        num_layers=2,
        vace_layers=2,
        vace_in_dim=96,
        dtype=torch.float32,
        operations=comfy.ops.manual_cast,
    )
    return {name: torch.zeros_like(value) for name, value in model.state_dict().items() if name.startswith("vace_")}


def _camera():
    model = wan.CameraWanModel(
        dim=256, ffn_dim=512, num_heads=2, num_layers=1, dtype=torch.float32, operations=comfy.ops.manual_cast
    )
    return {name: torch.zeros_like(value) for name, value in model.state_dict().items() if name.startswith("control_")}


def test_add_on_with_a_part_without_effect_is_refused(t2v, tmp_path):
    save_file(_vace() | _camera(), tmp_path / "both.safetensors")
    with pytest.raises(
        QuantError, match="VaceWanModel has no layers control_adapter; choose an add-on for the variant"
    ):
        load_diffusion_model(t2v[1], add_on=tmp_path / "both.safetensors")
    with pytest.raises(QuantError, match="the layers of VACE and camera control"):
        convert(t2v[0], tmp_path / "merged.gguf", "Q8_0", modules=[tmp_path / "both.safetensors"])


def test_single_tensors_without_effect_are_logged(t2v, tmp_path, caplog):
    save_file(_vace() | {"vace_blocks.1.extra.weight": torch.zeros(4)}, tmp_path / "more.safetensors")
    load_diffusion_model(t2v[1], add_on=tmp_path / "more.safetensors")
    assert "1 of " in caplog.text
    assert "(vace_blocks.1.extra.weight, ...)" in caplog.text


def test_file_that_an_add_on_without_effect_was_merged_into_is_logged(state, tmp_path, write_gguf, caplog):
    merged = {name: tensor.float() for name, tensor in (state | _talking()).items()}
    load_diffusion_model(write_gguf(tmp_path / "merged.gguf", merged, lambda *_: "F32", five_d=True))
    assert "merged.gguf: 4 tensors of InfiniteTalk or MultiTalk" in caplog.text


ARGUMENTS = {
    "VaceWanModel": {"model_type": "vace", "vace_layers": 2, "vace_in_dim": 96},
    "CameraWanModel": {"model_type": "camera"},
    "WanModel_S2V": {"model_type": "s2v"},
    "HumoWanModel": {"model_type": "humo"},
}


def _classes(cls):
    return {cls, *(below for each in cls.__subclasses__() for below in _classes(each))}


def test_known_layers_are_those_of_the_host():
    """Hold the table of what ComfyUI ignores to the classes that this ComfyUI has."""
    named = {}
    for cls in _classes(wan.WanModel):
        with suppress(TypeError):
            arguments = ARGUMENTS.get(cls.__name__, {"model_type": "t2v"})
            model = cls(**arguments, device="meta", operations=comfy.ops.manual_cast)
            named[cls.__name__] = list(model.state_dict())
    assert {"WanModel", "VaceWanModel", "CameraWanModel", "WanModel_S2V", "AnimateWanModel"} <= named.keys()
    for cls, names in named.items():
        assert find_without_layers(names) is None, cls
    taken = {part_of_add_on(name) for names in named.values() for name in names}
    assert {"vace_blocks", "control_adapter", "audio_injector", "face_adapter", "motion_encoder"} <= taken
