"""Type plans by recipe against published files and llama.cpp, and the rules for single tensors."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from gguf.constants import LlamaFileType

from wanquant.quant import QTYPES, QuantError
from wanquant.quant.plan.file_size import predicted_size
from wanquant.quant.plan.recipe import GGUF_RECIPES, RECIPES, find_recipe, plan_types
from wanquant.quant.plan.wan_shapes import SIZES, wan_shapes


class Info(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16


def infos(size, dtype=torch.bfloat16):
    return {name: Info(shape, dtype) for name, shape in wan_shapes(size).items()}


def type_of(name, shape, recipe="Q4_K_M", dtype=torch.bfloat16):
    return plan_types(RECIPES[recipe], {name: Info(shape, dtype)}).types[name].name


@pytest.mark.parametrize(
    ("size", "parameters"), [("1.3B", 1.419e9), ("5B", 5.000e9), ("14B", 14.288e9), ("I2V-14B", 16.395e9)]
)
def test_number_of_parameters_is_that_of_the_published_models(size, parameters):
    assert sum(map(math.prod, wan_shapes(size).values())) == pytest.approx(parameters, rel=5e-4)


@pytest.mark.parametrize(
    ("size", "recipe", "published"),
    [
        ("14B", "Q4_K_M", 9_651_728_896),  # Wan2.2-T2V-A14B
        ("I2V-14B", "Q6_K", 13_752_745_344),  # Wan2.1-Fun-InP-14B
    ],
)
def test_predicted_size_is_that_of_published_files(size, recipe, published):
    tensors = infos(size)
    assert predicted_size(plan_types(RECIPES[recipe], tensors).types, tensors) == pytest.approx(published, rel=1e-3)


def test_14b_fits_into_three_and_a_half_gigabytes():
    tensors = infos("14B")
    assert predicted_size(plan_types(RECIPES["IQ1_M"], tensors).types, tensors) == pytest.approx(3.489e9, rel=1e-3)


def test_published_files_of_wan_2_1_differ_only_by_f32_matrices():
    """Wan2.1-I2V-14B-480P Q4_K_M has F32 where we have 16 bits, in the matrices that are not quantized.

    Source: city96/ComfyUI-GGUF tools/lcpp.patch @ 929a9e5, "Keep img_emb in F32 for wan i2v".
    """
    tensors = infos("I2V-14B")
    types = plan_types(RECIPES["Q4_K_M"], tensors).types
    wide = {name: QTYPES["F32"] if qtype.name == "BF16" else qtype for name, qtype in types.items()}
    assert predicted_size(wide, tensors) == pytest.approx(11_341_184_384, abs=1024)
    assert predicted_size(types, tensors) == pytest.approx(11_341_184_384, rel=0.043)


@pytest.mark.parametrize("recipe", GGUF_RECIPES.values(), ids=GGUF_RECIPES)
def test_file_type_is_llama_cpps_number(recipe):
    assert recipe.file_type == LlamaFileType["MOSTLY_" + recipe.name]


@pytest.mark.parametrize("size", SIZES)
def test_only_matrices_of_the_blocks_are_quantized(size):
    for name, qtype in plan_types(RECIPES["Q2_K"], infos(size)).types.items():
        assert (qtype.block_size > 1) == (name.startswith("blocks.") and len(wan_shapes(size)[name]) == 2)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("blocks.7.self_attn.q.weight", (5120, 5120), "Q4_K"),
        ("blocks.7.self_attn.v.weight", (5120, 5120), "Q6_K"),
        ("blocks.7.cross_attn.v.weight", (5120, 5120), "Q6_K"),
        ("blocks.7.cross_attn.v_img.weight", (5120, 5120), "Q4_K"),
        ("blocks.7.ffn.0.weight", (13824, 5120), "Q4_K"),
        ("blocks.7.ffn.2.weight", (5120, 13824), "Q6_K"),
        ("vace_blocks.0.before_proj.weight", (5120, 5120), "Q4_K"),
        ("vace_blocks.0.self_attn.v.weight", (5120, 5120), "Q6_K"),
        ("face_adapter.fuser_blocks.0.linear1_kv.weight", (10240, 5120), "Q4_K"),
        ("blocks.7.self_attn.norm_q.weight", (5120,), "F32"),
        ("blocks.7.ffn.0.bias", (13824,), "F32"),
        ("blocks.7.modulation", (1, 6, 5120), "F32"),
        ("head.modulation", (1, 2, 5120), "F32"),
        ("patch_embedding.weight", (5120, 16, 1, 2, 2), "F32"),
        ("vace_patch_embedding.weight", (5120, 96, 1, 2, 2), "F32"),
        ("ref_conv.weight", (5120, 16, 2, 2), "F32"),
        ("img_emb.emb_pos", (1, 514, 1280), "F32"),
        ("motion_encoder.enc.fc.0.weight", (512, 512), "F32"),
        ("trainable_cond_mask.weight", (3, 5120), "F32"),
        ("casual_audio_encoder.weights", (1, 25, 1, 1), "F32"),
        ("music_encoder.0.self_attn.in_proj_weight", (768, 256), "F32"),
        ("tiny.weight", (4, 256), "F32"),
        ("text_embedding.0.weight", (5120, 4096), "BF16"),
        ("time_embedding.0.weight", (5120, 256), "BF16"),
        ("time_projection.1.weight", (30720, 5120), "BF16"),
        ("img_emb.proj.1.weight", (1280, 1280), "BF16"),
        ("head.head.weight", (64, 5120), "BF16"),
    ],
)
def test_type_follows_from_name_and_shape(name, shape, expected):
    assert type_of(name, shape) == expected


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("Q4_K_S", ["Q5_K", "Q5_K", "Q4_K"]),
        ("Q3_K_M", ["Q5_K", "Q4_K", "Q4_K"]),
        ("Q2_K", ["Q3_K"] * 3),
        ("Q6_K", ["Q6_K"] * 3),
    ],
)
def test_value_projections_of_the_first_blocks_get_more_bits(recipe, expected):
    assert [type_of(f"blocks.{n}.cross_attn.v.weight", (512, 512), recipe) for n in (0, 1, 10)] == expected


@pytest.mark.parametrize(
    ("dtype", "kept"), [(torch.float32, "F16"), (torch.float16, "F16"), (torch.bfloat16, "BF16")], ids=str
)
def test_unquantized_matrices_keep_16_bits(dtype, kept):
    assert type_of("head.head.weight", (64, 5120), dtype=dtype) == kept


@pytest.mark.parametrize("recipe", ["F16", "BF16"])
def test_16_bit_recipes_apply_to_every_matrix(recipe):
    types = plan_types(RECIPES[recipe], infos("1.3B", torch.float32)).types
    assert {types[name].name for name, shape in wan_shapes("1.3B").items() if len(shape) == 2} == {recipe}


@pytest.mark.parametrize(
    ("recipe", "in_features", "got"),
    [
        *((recipe, 96, "IQ4_NL") for recipe in ("Q2_K", "Q3_K_S", "IQ4_XS")),
        ("Q4_K_S", 96, "Q5_0"),
        ("Q5_K_S", 96, "Q5_1"),
        ("Q6_K", 96, "Q8_0"),
        ("Q4_K_S", 100, "BF16"),
        ("Q8_0", 100, "BF16"),
    ],
)
def test_rows_that_are_not_a_multiple_of_the_block_size_get_a_fallback(recipe, in_features, got):
    type_plan = plan_types(RECIPES[recipe], {"blocks.0.ffn.0.weight": Info((64, in_features))})
    assert type_plan.types["blocks.0.ffn.0.weight"].name == got
    (fallback,) = type_plan.fallbacks
    assert fallback.got == got
    assert f"rows of {in_features} elements" in fallback.reason


def test_wan_needs_no_fallback():
    assert not any(plan_types(recipe, infos(size)).fallbacks for size in SIZES for recipe in RECIPES.values())


def test_recipe_is_found_in_any_case_and_an_unknown_one_is_refused():
    assert find_recipe("q4_k_m") is RECIPES["Q4_K_M"]
    with pytest.raises(QuantError, match="recipe Q9_Z: unknown; choose one of F16, BF16, Q8_0"):
        find_recipe("Q9_Z")
