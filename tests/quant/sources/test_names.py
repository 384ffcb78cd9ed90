"""Renaming from the names of other tools to ComfyUI's names."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from wanquant.quant import QuantError
from wanquant.quant.sources.checkpoint import open_checkpoint
from wanquant.quant.sources.names import find_naming
from wanquant.testing.tiny_wan import write_tiny_wan

# Pairs of the name in Diffusers and the name in ComfyUI, of modules and of single tensors.
PAIRS = (
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
    ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    ("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
    ("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos"),
    ("patch_embedding", "patch_embedding"),
    ("vace_patch_embedding", "vace_patch_embedding"),
    ("scale_shift_table", "head.modulation"),
    ("proj_out", "head.head"),
    ("vace_blocks.0.proj_in", "vace_blocks.0.before_proj"),
    ("vace_blocks.7.proj_out", "vace_blocks.7.after_proj"),
    *(
        (f"{block}.{theirs}", f"{block}.{ours}")
        for block in ("blocks.0", "blocks.39", "vace_blocks.7")
        for theirs, ours in (
            ("scale_shift_table", "modulation"),
            ("norm2", "norm3"),
            ("ffn.net.0.proj", "ffn.0"),
            ("ffn.net.2", "ffn.2"),
            ("attn1.norm_q", "self_attn.norm_q"),
            ("attn1.norm_k", "self_attn.norm_k"),
            ("attn2.norm_q", "cross_attn.norm_q"),
            ("attn2.norm_k", "cross_attn.norm_k"),
            ("attn2.norm_added_k", "cross_attn.norm_k_img"),
            ("attn2.add_k_proj", "cross_attn.k_img"),
            ("attn2.add_v_proj", "cross_attn.v_img"),
            *((f"attn1.to_{letter}", f"self_attn.{letter}") for letter in "qkv"),
            *((f"attn2.to_{letter}", f"cross_attn.{letter}") for letter in "qkv"),
            ("attn1.to_out.0", "self_attn.o"),
            ("attn2.to_out.0", "cross_attn.o"),
        )
    ),
)
PARAMETERS = ("scale_shift_table", "pos_embed")
DIFFUSERS_KEY = "condition_embedder.time_proj.weight"


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize(("theirs", "ours"), PAIRS)
def test_diffusers_names_become_comfyui_names(tmp_path, theirs, ours, prefix):
    naming = find_naming(tmp_path, {prefix + DIFFUSERS_KEY})
    assert naming.prefix == prefix
    if theirs.endswith(PARAMETERS):
        assert naming.rename(theirs) == ours
    else:
        for suffix in (".weight", ".bias", ".weight_scale"):
            assert naming.rename(theirs + suffix) == ours + suffix


def diffusers_name(name):
    if name == "head.modulation":
        return "scale_shift_table"
    theirs = max((pair for pair in PAIRS if name.startswith(pair[1])), key=lambda pair: len(pair[1]))
    return theirs[0] + name[len(theirs[1]) :]


PREFIXES = (
    "",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "module.",
    "dit.",
    "pipe.dit.",
    "_orig_mod.",
    "base_model.model.",
    "model.",
    "net.",
    "module.model.",
    "module._orig_mod.",
    "_orig_mod.module.dit.",
    "transformer_2.",
)
UNKNOWN_PREFIXES = ("ema.", "model_ema.", "generator_ema.model.", "student.", "fake_score.model.", "noise_model.")
ADD_ON = ("vace_patch_embedding.bias", "vace_blocks.0.after_proj.bias")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("naming", ["Wan", "Diffusers", "add-on"])
def test_prefixes(tmp_path, prefix, naming):
    """Tensors of another model in the same file are left out, where the prefix tells them apart."""
    path = write_tiny_wan(tmp_path / "a.safetensors", layers=1, dim=128, ffn_dim=128)
    expected = {name: torch.zeros(2) for name in ADD_ON} if naming == "add-on" else load_file(path)
    rename = diffusers_name if naming == "Diffusers" else str
    tensors = {prefix + rename(name): value for name, value in expected.items()}
    if prefix not in ("", "_orig_mod.") and naming != "add-on":
        tensors["first_stage_model.decoder.bias"] = torch.zeros(2)
    save_file(tensors, tmp_path / "b.safetensors")
    with open_checkpoint(tmp_path / "b.safetensors") as checkpoint:
        assert {name: t.shape for name, t in checkpoint.tensors.items()} == {n: v.shape for n, v in expected.items()}


@pytest.mark.parametrize("prefix", UNKNOWN_PREFIXES)
@pytest.mark.parametrize("rename", [str, diffusers_name])
def test_prefixes_of_any_trainer(tmp_path, prefix, rename):
    expected = load_file(write_tiny_wan(tmp_path / "a.safetensors", layers=1, dim=128, ffn_dim=128))
    tensors = {prefix + rename(name): value for name, value in expected.items()}
    save_file(tensors | {"vae.decoder.bias": torch.zeros(2)}, tmp_path / "b.safetensors")
    with open_checkpoint(tmp_path / "b.safetensors") as checkpoint:
        assert checkpoint.tensors.keys() == expected.keys()
        assert checkpoint.warnings == []


def two_models(tmp_path, first, second, rename=str):
    """Write a file of two models, and return it with the tensors of the first one."""
    expected = load_file(write_tiny_wan(tmp_path / "a.safetensors", layers=1, dim=128, ffn_dim=128))
    models = {first: expected, second: {name: tensor + 1 for name, tensor in expected.items()}}
    tensors = {prefix + rename(name): t for prefix, model in models.items() for name, t in model.items()}
    save_file(tensors, tmp_path / "b.safetensors")
    return tmp_path / "b.safetensors", expected


@pytest.mark.parametrize("rename", [str, diffusers_name])
@pytest.mark.parametrize("prefixes", [("transformer.", "transformer_2."), ("model.", "student."), ("", "dit.")])
def test_two_models_in_one_file_are_refused(tmp_path, rename, prefixes):
    path, _ = two_models(tmp_path, *prefixes, rename)
    first, second = (f"'{prefix}'" if prefix else "no prefix" for prefix in sorted(prefixes))
    with pytest.raises(QuantError, match=f"the tensors of 2 models, under {first} and {second}, expected those of one"):
        open_checkpoint(path)


@pytest.mark.parametrize("average", ["model_ema.", "ema.", "ema_model.", "generator_ema.model."])
def test_averages_beside_the_model_are_left_out_with_a_warning(tmp_path, average):
    path, expected = two_models(tmp_path, "model.", average)
    with open_checkpoint(path) as checkpoint:
        assert [warning.endswith(f"; left out: '{average}'") for warning in checkpoint.warnings] == [True]
        assert checkpoint.tensors.keys() == expected.keys()
        assert all(torch.equal(t.read().view(t.shape), expected[name]) for name, t in checkpoint.tensors.items())


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."])
def test_wrappers_within_names(tmp_path, wrapper):
    expected = load_file(write_tiny_wan(tmp_path / "a.safetensors", layers=1, dim=128, ffn_dim=128))
    tensors = {name.replace("blocks.0.", f"blocks.0.{wrapper}"): value for name, value in expected.items()}
    assert tensors.keys() != expected.keys()
    save_file(tensors, tmp_path / "b.safetensors")
    with open_checkpoint(tmp_path / "b.safetensors") as checkpoint:
        assert checkpoint.tensors.keys() == expected.keys()


def test_peft_names(tmp_path):
    """PEFT keeps the weights of a layer with a LoRA as its base layer, and the LoRA beside it until it is merged."""
    expected = load_file(write_tiny_wan(tmp_path / "a.safetensors", layers=1, dim=128, ffn_dim=128))
    tensors = {f"base_model.model.{n.replace('attn.q.', 'attn.q.base_layer.')}": v for n, v in expected.items()}
    save_file(tensors, tmp_path / "b.safetensors")
    with open_checkpoint(tmp_path / "b.safetensors") as checkpoint:
        assert checkpoint.tensors.keys() == expected.keys()
    tensors["base_model.model.blocks.0.self_attn.q.lora_A.default.weight"] = torch.zeros(4, 128)
    save_file(tensors, tmp_path / "c.safetensors")
    with pytest.raises(QuantError, match=r"c\.safetensors: tensor .*lora_A.*: belongs to a LoRA.*merge it"):
        open_checkpoint(tmp_path / "c.safetensors")


@pytest.mark.parametrize("variant", ["t2v", "i2v"])
def test_checkpoint_with_diffusers_names_has_the_same_tensors(tmp_path, variant):
    path = write_tiny_wan(tmp_path / "a.safetensors", layers=1, variant=variant)
    expected = load_file(path)
    save_file({diffusers_name(name): value for name, value in expected.items()}, tmp_path / "b.safetensors")
    with open_checkpoint(tmp_path / "b.safetensors") as checkpoint:
        assert checkpoint.tensors.keys() == expected.keys()
        for name, tensor in checkpoint.tensors.items():
            assert torch.equal(tensor.read().view(tensor.shape), expected[name])


def test_scaled_fp8_with_diffusers_names_is_read(tmp_path):
    tensors = {
        "condition_embedder.time_proj.weight": torch.zeros(2, 2),
        "blocks.0.ffn.net.2.weight": torch.ones(2, 2).to(torch.float8_e4m3fn),
        "blocks.0.ffn.net.2.scale_weight": torch.tensor(3.0),
        "scaled_fp8": torch.zeros(0),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    with open_checkpoint(tmp_path / "a.safetensors") as checkpoint:
        assert checkpoint.tensors.keys() == {"time_projection.1.weight", "blocks.0.ffn.2.weight"}
        assert checkpoint.tensors["blocks.0.ffn.2.weight"].read().tolist() == [3.0] * 4


def test_unknown_diffusers_name_is_refused(tmp_path):
    tensors = {DIFFUSERS_KEY: torch.zeros(2), "rope.freqs_cos": torch.zeros(2)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(QuantError, match=r"tensor rope\.freqs_cos: has no known counterpart"):
        open_checkpoint(tmp_path / "a.safetensors")
