"""Every Wan variant the host builds: a GGUF is detected as its dense checkpoint is, and computes the same."""

from __future__ import annotations

import json

import comfy.ldm.wan.model as wan
import comfy.ops
import comfy.sd
import pytest
import torch
from comfy.ldm.wan.model_animate import AnimateWanModel
from comfy.ldm.wan.model_wandancer import WanDancerModel
from safetensors.torch import load_file, save_file

try:
    from comfy.ldm.wan.model_animate2 import WanAnimate2Model
except ImportError:  # before 0.33
    WanAnimate2Model = None

from wanquant.ops.loading.diffusion_model import load_diffusion_model
from wanquant.ops.merged_source import merged_checkpoint
from wanquant.ops.packed.layout import is_packed
from wanquant.quant.conversion.convert import convert

# name: (model class, its arguments, the host's class for it)
VARIANTS = {
    "t2v": (wan.WanModel, {}, "WAN21_T2V"),
    "t2v-14B-i2v": (wan.WanModel, {"in_dim": 36}, "WAN21_T2V"),
    "5B": (wan.WanModel, {"in_dim": 48, "out_dim": 48}, "WAN22_T2V"),
    "i2v": (wan.WanModel, {"model_type": "i2v", "in_dim": 36}, "WAN21_I2V"),
    "flf2v": (wan.WanModel, {"model_type": "i2v", "in_dim": 36, "flf_pos_embed_token_number": 514}, "WAN21_I2V"),
    "fun-control": (wan.WanModel, {"model_type": "i2v", "in_dim": 48}, "WAN21_FunControl2V"),
    "fun-control-ref": (wan.WanModel, {"model_type": "i2v", "in_dim": 48, "in_dim_ref_conv": 16}, "WAN21_FunControl2V"),
    "vace": (wan.VaceWanModel, {"vace_layers": 2, "vace_in_dim": 96}, "WAN21_Vace"),
    "camera": (wan.CameraWanModel, {"model_type": "camera", "in_dim": 32}, "WAN21_Camera"),
    "camera_2.2": (wan.CameraWanModel, {"model_type": "camera_2.2", "in_dim": 36}, "WAN22_Camera"),
    "s2v": (wan.WanModel_S2V, {}, "WAN22_S2V"),
    "humo": (wan.HumoWanModel, {"in_dim": 36}, "WAN21_HuMo"),
    "animate": (AnimateWanModel, {"in_dim": 36, "num_layers": 5}, "WAN22_Animate"),
    "animate2": (WanAnimate2Model, {"in_dim": 36}, "WAN_Animate2"),
    "scail": (wan.SCAILWanModel, {}, "WAN21_SCAIL"),
    "scail2": (getattr(wan, "SCAIL2WanModel", None), {"model_type": "i2v"}, "WAN21_SCAIL2"),
    "wandancer": (WanDancerModel, {"in_dim": 36}, "WAN22_WanDancer"),
}
# What tells a variant where names and shapes do not.
METADATA = {"animate2": {"config": json.dumps({"transformer": {"model_type": "animate2"}})}}
TINY = {"dim": 256, "ffn_dim": 512, "num_heads": 2, "num_layers": 2}

VIDEO, TEXT, CLIP = (1, 16, 2, 8, 8), (1, 7, 4096), (1, 257, 1280)
# What a forward needs beside the noise (1, in_dim, 2, 8, 8), the time and the text.
INPUTS = {
    "t2v": {},
    "5B": {},
    "i2v": {"clip_fea": CLIP},
    "flf2v": {"clip_fea": (1, 514, 1280)},
    "fun-control": {"clip_fea": CLIP},
    "vace": {"vace_context": (1, 1, 96, 2, 8, 8), "vace_strength": [1.0]},
    "camera": {"clip_fea": CLIP, "camera_conditions": (1, 24, 2, 64, 64)},
    "camera_2.2": {"camera_conditions": (1, 24, 2, 64, 64)},
    "humo": {"audio_embed": (1, 2, 8, 5, 1280)},
    "animate": {"clip_fea": CLIP, "pose_latents": (1, 16, 1, 8, 8)},
    "animate2": {"clip_fea": CLIP, "pose_latents": (1, 16, 1, 8, 8)},
    "s2v": {"audio_embed": (1, 25, 1024, 8), "reference_latent": (1, 16, 1, 8, 8)},
    "scail": {"clip_fea": CLIP, "pose_latents": (1, 20, 2, 8, 8), "reference_latent": (1, 20, 1, 8, 8)},
    "scail2": {"clip_fea": CLIP, "sam_latents": (1, 28, 2, 8, 8), "pose_latents": (1, 20, 2, 8, 8)},
    "wandancer": {"clip_fea": CLIP, "audio_embed": (1, 60, 35)},
}


def write_variant(name, folder, tiny_wan):
    cls, arguments, _ = VARIANTS[name]
    model = cls(**(TINY | arguments), dtype=torch.float32, operations=comfy.ops.manual_cast)
    generator = torch.Generator().manual_seed(0)
    state = {
        key: tiny_wan["random_tensor"](key, tuple(value.shape), generator).to(torch.bfloat16)
        for key, value in model.state_dict().items()
    }
    save_file(state, folder / f"{name}.safetensors", metadata=METADATA.get(name))
    return folder / f"{name}.safetensors"


def forward(patcher, name):
    model = patcher.patch_model(torch.device("cpu")).diffusion_model
    generator = torch.Generator().manual_seed(1)

    def noise(shape):
        return torch.randn(shape, generator=generator)

    extra = {key: noise(v) if isinstance(v, tuple) else v for key, v in INPUTS[name].items()}
    x = noise((1, model.in_dim, *VIDEO[2:]))
    with torch.no_grad():
        return model(x, torch.tensor([500.0]), noise(TEXT), **extra)


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name, tmp_path, tiny_wan, sqnr):
    if VARIANTS[name][0] is None:
        pytest.skip(f"this host has no {name}")
    source = write_variant(name, tmp_path, tiny_wan)
    gguf = convert(source, tmp_path / f"{name}.gguf", "Q8_0", effort="fast").path
    dense = comfy.sd.load_diffusion_model_state_dict(load_file(source), metadata=METADATA.get(name))
    packed = load_diffusion_model(gguf)

    assert type(packed.model.model_config).__name__ == VARIANTS[name][2]
    assert type(packed.model.model_config) is type(dense.model.model_config)
    assert packed.model.model_config.unet_config == dense.model.model_config.unet_config
    weights = packed.model.diffusion_model.state_dict()
    assert weights.keys() == dense.model.diffusion_model.state_dict().keys()
    assert is_packed(weights["blocks.0.ffn.0.weight"])
    assert packed.model_size() < dense.model_size()
    if name in INPUTS:
        assert sqnr(forward(dense, name), forward(packed, name)) > 40
    saved = convert(merged_checkpoint(packed, torch.device("cpu")), tmp_path / "saved.gguf", "Q8_0", effort="fast")
    assert type(load_diffusion_model(saved.path).model.model_config) is type(dense.model.model_config)
