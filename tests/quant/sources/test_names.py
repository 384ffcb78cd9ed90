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
