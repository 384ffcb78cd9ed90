"""Every Wan variant the host builds: a GGUF is detected as its dense checkpoint is, and computes the same."""

from __future__ import annotations

import json
import math
import re

import comfy.ldm.wan.model as wan
import comfy.ops
import comfy.sd
import pytest
import torch
from comfy.ldm.wan.model_animate import AnimateWanModel
from comfy.ldm.wan.model_wandancer import WanDancerModel
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file

try:
    from comfy.ldm.wan.model_animate2 import WanAnimate2Model
except ImportError:  # before 0.33
    WanAnimate2Model = None

from wanquant.ops.loading import diffusion_model
from wanquant.ops.loading.diffusion_model import load_diffusion_model
from wanquant.ops.merged_source import merged_checkpoint
from wanquant.ops.packed.layout import is_packed
from wanquant.quant import QuantError
from wanquant.quant.conversion.convert import convert
from wanquant.quant.gguf.provenance import carried_metadata
from wanquant.quant.sources.checkpoint import open_checkpoint
from wanquant.quant.sources.completeness import missing_names

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


@pytest.fixture(params=VARIANTS)
def name(request):
    if VARIANTS[request.param][0] is None:
        pytest.skip(f"this host has no {request.param}")
    return request.param


def test_variant(name, tmp_path, variant_file, sqnr):
    source = variant_file(name)
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


def as_ggml(shape):
    """Return the shape in which stable-diffusion.cpp writes a tensor: at most 4 dimensions, none of 1 in front."""
    shape = (math.prod(shape[: len(shape) - 3]), *shape[-3:]) if len(shape) > 4 else shape
    return shape[next((n for n, size in enumerate(shape) if size > 1), len(shape) - 1) :]


def as_matrix(shape):
    """Return a convolution's shape as the matrix of its output channels."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 3 and shape[0] > 1 else as_ggml(shape)


@pytest.mark.parametrize("reshape", [as_ggml, as_matrix])
def test_shapes_of_other_tools(name, reshape, tmp_path, variant_file):
    source = variant_file(name)
    dense = {key: value.float() for key, value in load_file(source).items()}
    # The motion encoder is Animate's. Its convolutions have no bias, from which the channels follow.
    kept = "motion_encoder" if reshape is as_matrix else "-"
    other = {key: v if key.startswith(kept) else v.reshape(reshape(v.shape)) for key, v in dense.items()}
    writer = GGUFWriter(tmp_path / "other.gguf", "wan")
    if name in METADATA:
        writer.add_string(next(iter(carried_metadata(METADATA[name]))), METADATA[name]["config"])
    for key, value in other.items():
        writer.add_tensor(key, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(other, tmp_path / "other.safetensors", metadata=METADATA.get(name))

    loaded = load_diffusion_model(tmp_path / "other.gguf", dtype=torch.float32).model
    assert type(loaded.model_config).__name__ == VARIANTS[name][2]
    weights = loaded.diffusion_model.state_dict()
    for key, value in dense.items():
        assert torch.equal(weights[key].float(), value), key
    for suffix in ("gguf", "safetensors"):
        with open_checkpoint(tmp_path / f"other.{suffix}") as checkpoint:
            assert {key: t.shape for key, t in checkpoint.tensors.items()} == {k: v.shape for k, v in dense.items()}
            assert all(torch.equal(t.read(), dense[key].flatten()) for key, t in checkpoint.tensors.items())


# Parameters that the host does not need to find, by variant.
OPTIONAL = {"flf2v": ["img_emb.emb_pos"]}


def test_names_that_a_variant_must_have(name):
    """The list of names without the host is the host's own: a model lacks exactly the parameter that is taken away."""
    cls, arguments, _ = VARIANTS[name]
    model = cls(**(TINY | arguments), device="meta", dtype=torch.float32, operations=comfy.ops.manual_cast)
    names = [key for key, _ in model.named_parameters()]
    assert missing_names(names, "wan") == []
    lacking = {key: missing_names([other for other in names if other != key], "wan") for key in names}
    assert lacking == {key: [] if key in OPTIONAL.get(name, ()) else [key] for key in names}


def test_incomplete_variants_are_refused(name, tmp_path, variant_file, write_gguf):
    """Buffers may be absent, since the host computes them; every parameter must be there."""
    state = load_file(variant_file(name))
    metadata = carried_metadata(METADATA.get(name, {}))
    buffers = [key for key in state if key.endswith(".kernel")]
    complete = {key: value for key, value in state.items() if key not in buffers}

    path = write_gguf(tmp_path / "a.gguf", complete, lambda *_: "BF16", metadata=metadata)
    loaded = load_diffusion_model(path)
    assert type(loaded.model.model_config).__name__ == VARIANTS[name][2]
    # One name of the blocks, one that the detection reads, and the first and last of what the variant adds.
    own = [key for key in complete if key not in wan_names()]
    own = [key for key in own if key not in OPTIONAL.get(name, ())]
    for key in {"blocks.1.ffn.2.weight", "blocks.0.ffn.0.weight", "patch_embedding.bias", *own[:1], *own[-1:]}:
        rename_in_place(path, key, key[:-1] + "_")
        for read in (load_diffusion_model, lambda source: convert(source, tmp_path / "never.gguf", "Q8_0")):
            with pytest.raises(QuantError, match=rf"incomplete: tensor {re.escape(key)} is missing"):
                read(path)
        rename_in_place(path, key[:-1] + "_", key)
    assert not (tmp_path / "never.gguf").exists()


def rename_in_place(path, name, other):
    """Give a tensor in a GGUF another name of the same length."""
    with open(path, "r+b") as file:
        header = file.read(1 << 17)
        field = len(name).to_bytes(8, "little") + name.encode()
        assert header.count(field) == 1
        file.seek(header.index(field) + 8)
        file.write(other.encode())


def wan_names():
    return {*wan.WanModel(**TINY, device="meta", operations=comfy.ops.manual_cast).state_dict()}


def test_parameters_that_only_the_host_knows(tmp_path, tiny_wan, write_gguf, monkeypatch):
    """What the list of names does not have is found in the host's model, as for its future variants."""
    state = load_file(tiny_wan["write_tiny_wan"](tmp_path / "a.safetensors", layers=2, ffn_dim=512))
    del state["blocks.1.modulation"], state["blocks.1.norm3.bias"], state["text_embedding.0.weight"]
    monkeypatch.setattr(diffusion_model, "check_complete", lambda *_: None)
    path = write_gguf(tmp_path / "a.gguf", state, lambda *_: "BF16")
    with pytest.raises(QuantError, match=r"a\.gguf: incomplete: 3 tensors are missing, the first is \S+, expected"):
        load_diffusion_model(path)
