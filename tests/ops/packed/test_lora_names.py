"""LoRAs under the names of other trainers, loaded by ComfyUI's own loader."""

from __future__ import annotations

import re

import comfy.hooks
import pytest
import torch
from comfy import weight_adapter

from wanquant.ops.packed.lora_names import WanNames, register_lora_names
from wanquant.quant import QuantError
from wanquant.quant.sources.lora_names import layer_name
from wanquant.tests.ops.packed.patching import forward, load, lora, with_lora

TO_DIFFUSERS = (
    *((rf"self_attn\.{part}\b", f"attn1.to_{part}") for part in "qkv"),
    *((rf"cross_attn\.{part}\b", f"attn2.to_{part}") for part in "qkv"),
    *((r"self_attn\.o\b", "attn1.to_out.0"), (r"cross_attn\.o\b", "attn2.to_out.0")),
    *((r"ffn\.0\b", "ffn.net.0.proj"), (r"ffn\.2\b", "ffn.net.2"), (r"norm3\b", "norm2")),
    *((r"self_attn\.norm_q\b", "attn1.norm_q"), (r"modulation\b", "scale_shift_table")),
)


def diffusers(layer):
    """Return the name that Diffusers gives to a layer of a block."""
    for pattern, replacement in TO_DIFFUSERS:
        layer = re.sub(pattern, replacement, layer)
    return layer


def flat(layer):
    return layer.replace(".", "_")


LAYERS = {
    "bare": lambda layer: layer,
    "bare, Diffusers": diffusers,
    "pipe.dit.": lambda layer: f"pipe.dit.{layer}",
    "transformer.": lambda layer: f"transformer.{layer}",
    "transformer., Diffusers": lambda layer: f"transformer.{diffusers(layer)}",
    "diffusion_model., Diffusers": lambda layer: f"diffusion_model.{diffusers(layer)}",
    "base_model.model.": lambda layer: f"base_model.model.{layer}",
    "base_model.model., Diffusers": lambda layer: f"base_model.model.{diffusers(layer)}",
    "base_model.model.diffusion_model.": lambda layer: f"base_model.model.diffusion_model.{layer}",
    "unet.base_model.model.": lambda layer: f"unet.base_model.model.{layer}",
    "model.diffusion_model.": lambda layer: f"model.diffusion_model.{layer}",
    "lora_unet__": lambda layer: f"lora_unet__{flat(layer)}",
    "lora_unet_, Diffusers": lambda layer: f"lora_unet_{flat(diffusers(layer))}",
    "lora_unet_ with dots": lambda layer: "lora_unet_" + layer.replace(".", "_", 1),
    "lora_transformer_": lambda layer: f"lora_transformer_{flat(diffusers(layer))}",
    "_orig_mod. in a block": lambda layer: layer.replace("blocks.0.", "blocks.0._orig_mod."),
    "lycoris_": lambda layer: f"lycoris_{flat(layer)}",
    "lycoris_, Diffusers": lambda layer: f"lycoris_{flat(diffusers(layer))}",
}
ENDS = {
    "peft": {"lora_A.weight": "lora_A.weight", "lora_B.weight": "lora_B.weight"},
    "default": {"lora_A.weight": "lora_A.default.weight", "lora_B.weight": "lora_B.default.weight"},
    "another adapter's name": {
        "lora_A.weight": "lora_A.high_noise.weight",
        "lora_B.weight": "lora_B.high_noise.weight",
    },
    "kohya": {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"},
    "diffusers": {"lora_A.weight": "lora.down.weight", "lora_B.weight": "lora.up.weight"},
}


def renamed(tensors, layers, ends):
    """Return the tensors of `lora` under the names of another trainer."""
    result = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"diffusion_model\.(blocks\.\d+\.(?:norm3|modulation|\w+\.\w+))\.(.+)", name)
        result[f"{layers(match[1])}.{ends.get(match[2], match[2])}"] = tensor
    assert len(result) == len(tensors)
    return result


def same_patches(left, right):
    assert left.patches.keys() == right.patches.keys()
    for key, ((_, mine, *_), *more) in left.patches.items():
        ((_, other, *_),) = right.patches[key]
        assert not more and type(mine) is type(other)
        pairs = zip(*(getattr(value, "weights", value) for value in (mine, other)), strict=True)
        for a, b in ((a[0], b[0]) if isinstance(a, tuple) else (a, b) for a, b in pairs):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return True


WITHOUT_FACTORS = {
    "cross_attn.q.diff": (256, 256),
    "cross_attn.q.diff_b": (256,),
    "ffn.0.diff_b": (512,),
    "norm3.w_norm": (256,),
    "norm3.b_norm": (256,),
    "self_attn.norm_q.set_weight": (256,),
    "modulation.diff": (1, 6, 256),
}


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("factors", [True, False], ids=["with factors", "alone"])
def test_what_is_no_factor_is_found_too(model, state, layers, factors, caplog):
    tensors = lora(state, rank=1) if factors else {}
    tensors |= {f"diffusion_model.blocks.0.{name}": torch.randn(shape) for name, shape in WITHOUT_FACTORS.items()}
    patched = with_lora(model, renamed(tensors, LAYERS[layers], {}))
    assert len(patched.patches) == 7 + (10 if factors else 0)
    assert same_patches(patched, with_lora(model, tensors))
    assert "lora key not loaded" not in caplog.text


@pytest.mark.parametrize("prefix", ["", "transformer.", "diffusion_model."])
def test_differences_of_modulations(model, prefix):
    """lightx2v writes `diff_m` behind the name of the block."""
    theirs = {f"{prefix}blocks.1.diff_m": torch.ones(1, 6, 256), f"{prefix}head.diff_m": torch.ones(1, 2, 256)}
    ours = {"blocks.1.modulation.diff": torch.ones(1, 6, 256), "head.modulation.diff": torch.ones(1, 2, 256)}
    expected = with_lora(model, {f"diffusion_model.{name}": tensor for name, tensor in ours.items()})
    assert same_patches(with_lora(model, theirs), expected)


Q = "blocks.0.self_attn.q"
FACTORS = {f"{Q}.lora_A.weight": torch.ones(4, 256), f"{Q}.lora_B.weight": torch.ones(256, 4)}


def of_peft(ends, alpha=None):
    """Return a LoRA of one layer as PEFT writes it, and as ComfyUI reads it without PEFT's tensors."""
    shared = FACTORS if alpha is None else FACTORS | {f"{Q}.alpha": torch.tensor(alpha)}
    theirs = {f"base_model.model.{name}": tensor for name, tensor in (shared | ends).items()}
    return theirs, {f"diffusion_model.{name}": tensor for name, tensor in shared.items()}


@pytest.mark.parametrize("end", ["", ".weight", ".default", ".default.weight"])
def test_magnitudes_of_peft(model, end):
    magnitude = torch.rand(256)
    theirs, ours = of_peft({f"{Q}.lora_magnitude_vector{end}": magnitude})
    expected = with_lora(model, ours | {f"diffusion_model.{Q}.dora_scale": magnitude.view(256, 1)})
    assert same_patches(with_lora(model, theirs), expected)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1), (8.0, 2)])
@pytest.mark.parametrize("end", ["lora_B.bias", "lora_B.default.bias"])
def test_bias_of_pefts_factor_has_the_scale_of_the_lora(model, end, alpha, scale):
    bias = torch.rand(256)
    theirs, ours = of_peft({f"{Q}.{end}": bias}, alpha)
    assert same_patches(
        with_lora(model, theirs), with_lora(model, ours | {f"diffusion_model.{Q}.diff_b": bias * scale})
    )


def test_what_is_left_over_is_named_once(model, state, caplog):
    tensors = renamed(lora(state), LAYERS["transformer."], {})
    tensors |= {f"transformer.blocks.{i}.attn3.to_q.lora_A.weight": torch.ones(4, 256) for i in range(5)}
    patched = with_lora(model, tensors)
    with_lora(model, tensors)  # A cached LoRA.
    assert len(patched.patches) == 10
    first, second = (record.getMessage() for record in caplog.records)
    assert first == second and " and 2 more; " in first
    assert first.startswith("LoRA: left out 5 tensors whose names Wan lacks: transformer.blocks.0.attn3.")


@pytest.mark.parametrize("layers", ["transformer., Diffusers", "transformer."])
def test_loras_of_two_models_in_one_file_are_refused(model, state, layers):
    high = renamed(lora(state), LAYERS[layers], {})
    low = {name.replace("transformer.", "transformer_2."): tensor + 1 for name, tensor in high.items()}
    for both in (high | low, low | high):
        with pytest.raises(
            QuantError, match=r"tensors transformer(_2)?\.\S+ and transformer(_2)?\.\S+ are for the same"
        ):
            with_lora(model, dict(both))
    assert len(with_lora(model, low).patches) == 10


def test_a_lora_read_again_and_for_another_model(model, state):
    """ComfyUI's nodes keep the tensors of a file, to which names were added."""
    tensors = renamed(lora(state), LAYERS["transformer."], {})
    expected = dict(tensors)
    first, second = with_lora(model, tensors), with_lora(model, tensors)
    assert same_patches(first, second)
    assert all(tensors[name] is tensor for name, tensor in expected.items())


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("ends", ENDS)
def test_every_naming_gives_the_same_patches(model, state, layers, ends, caplog):
    tensors = lora(state, dora_scale=lambda weight: torch.ones(weight.shape[0], 1))
    patched = with_lora(model, renamed(tensors, LAYERS[layers], ENDS[ends]))
    assert len(patched.patches) == 10
    assert same_patches(patched, with_lora(model, tensors))
    assert "lora key not loaded" not in caplog.text


def test_output_of_the_model(model, state):
    tensors = lora(state)
    expected = forward(load(with_lora(model, tensors)))
    model.detach()
    plain = forward(load(model))
    model.detach()
    output = forward(load(with_lora(model, renamed(tensors, LAYERS["pipe.dit."], ENDS["default"]))))
    assert torch.equal(output, expected)
    assert not torch.equal(output, plain)


def test_lokr_under_other_names(model, state):
    tensors = {
        "diffusion_model.blocks.0.ffn.0.lokr_w1": torch.randn(16, 16),
        "diffusion_model.blocks.0.ffn.0.lokr_w2": torch.randn(state["blocks.0.ffn.0.weight"].shape[0] // 16, 16),
        "diffusion_model.blocks.0.ffn.0.alpha": torch.tensor(4.0),
    }
    patched = with_lora(model, renamed(tensors, LAYERS["lycoris_, Diffusers"], {}))
    assert same_patches(patched, with_lora(model, tensors))


def test_a_hook_under_other_names(model, state):
    tensors = renamed(lora(state), LAYERS["transformer., Diffusers"], ENDS["peft"])
    hooks = comfy.hooks.create_hook_lora(lora=tensors, strength_model=1.0, strength_clip=0)
    target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
    model.register_all_hook_patches(hooks, target)
    ((patches),) = model.hook_patches.values()
    assert len(patches) == 10


@pytest.mark.parametrize(
    "layer",
    [
        "transformer.transformer_blocks.0.attn1.to_q",
        "lora_unet_down_blocks_0_attentions_0_proj_in",
        "lora_transformer_transformer_blocks_0_attn1_to_q",
        "text_encoders.umt5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
        "transformer.single_transformer_blocks.0.proj_out",
        "audio_blocks.0.self_attn.q",
    ],
)
def test_layers_of_other_models_are_no_layers_of_wan(layer, model):
    assert layer_name(layer) is None
    with pytest.raises(QuantError, match="none of its tensors names a weight of this model"):
        with_lora(model, {f"{layer}.lora_A.weight": torch.ones(4, 256), f"{layer}.lora_B.weight": torch.ones(256, 4)})


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("transformer.condition_embedder.time_embedder.linear_2", "time_embedding.2"),
        ("lora_unet_condition_embedder_time_proj", "time_projection.1"),
        ("transformer.proj_out", "head.head"),
        ("pipe.dit.head.head", "head.head"),
        ("transformer.blocks.0.attn2.add_v_proj", "blocks.0.cross_attn.v_img"),
        ("vace_blocks.0.proj_in", "vace_blocks.0.before_proj"),
        ("lora_unet_vace_blocks_1_self_attn_q", "vace_blocks.1.self_attn.q"),
    ],
)
def test_layers_outside_the_blocks_and_of_add_ons(theirs, ours):
    assert layer_name(theirs) == ours


def test_the_class_is_listed_once():
    register_lora_names()
    assert [adapter.name for adapter in weight_adapter.adapters].count(WanNames.name) == 1
