"""Damaged LoRAs, added by ComfyUI's own loader, are refused before the first step."""

from __future__ import annotations

import pytest
import torch
from comfy.weight_adapter import LoRAAdapter
from torch import ones

from wanquant.ops.packed.patch_check import computed_problem
from wanquant.quant import QuantError
from wanquant.tests.ops.packed.patching import forward, load, lora, with_lora

LAYER = "diffusion_model.blocks.0.self_attn.o"
NAN, INFINITY = float("nan"), float("inf")
UP, DOWN = ones(256, 4) / 100, ones(4, 256) / 100
NO_PRODUCT = "has factors whose product is not of its shape"


def plain(up=UP, down=DOWN, **more):
    return named(**{"lora_B.weight": up, "lora_A.weight": down}, **more)


def named(**tensors):
    return {f"{LAYER}.{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "tensors",
    [
        plain(down=DOWN * NAN),
        plain(up=UP.half() * INFINITY),
        plain(alpha=torch.tensor(NAN)),
        plain(alpha=torch.tensor(INFINITY)),
        plain(dora_scale=ones(256, 1) * NAN),
        named(lokr_w1=ones(4, 4), lokr_w2=ones(64, 64) * NAN),
        named(diff=ones(256, 256) * INFINITY),
        named(diff_b=ones(256) * NAN),
    ],
)
def test_values_that_are_not_finite(model, tensors):
    with pytest.raises(QuantError, match=rf"NaN or infinity in its patch of {LAYER}\.(weight|bias), expected finite"):
        with_lora(model, tensors)
    assert model.patches == {}


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        (plain(up=ones(256, 8)), NO_PRODUCT),
        (plain(up=ones(256)), NO_PRODUCT),
        (plain(down=ones(0, 256), up=ones(256, 0), alpha=torch.tensor(1.0)), "cannot be computed"),
        (plain(dora_scale=ones(7)), NO_PRODUCT),
        (plain(reshape_weight=torch.tensor([3, 5])), "cannot be computed .*larger than the original"),
        (plain(reshape_weight=torch.tensor([512, 512])), NO_PRODUCT),
        (named(**{"lora_up.weight": UP, "lora_down.weight": DOWN, "lora_mid.weight": ones(3)}), "cannot be computed"),
        (
            named(hada_w1_a=UP, hada_w1_b=DOWN, hada_w2_a=ones(3, 3), hada_w2_b=ones(7, 2)),
            r"cannot be computed .*\[3, 3\] X \[7, 2\]",
        ),
        (named(lokr_w1_a=ones(3, 5), lokr_w2=ones(7, 7)), "cannot be computed .*NoneType"),
        (named(lokr_w1=ones(3, 5), lokr_w2=ones(7, 7)), NO_PRODUCT),
        (named(lokr_w1=ones(4, 4), lokr_w2_a=ones(4, 4), lokr_w2_b=ones(4, 4), lokr_t2=ones(2)), "einsum"),
        (named(oft_blocks=ones(3, 5, 5)), NO_PRODUCT),
        (named(**{f"{part}.weight": ones(3) for part in ("a1", "a2", "b1", "b2")}), "cannot be computed"),
        (named(set_weight=ones(65536)), "cannot be computed"),
    ],
)
def test_shapes_that_cannot_be_computed(model, tensors, problem):
    with pytest.raises(QuantError, match=problem):
        with_lora(model, tensors)
    assert model.patches == {}


@torch.inference_mode()
def test_nodes_run_in_inference_mode():
    def problem(up):
        return computed_problem("k", LoRAAdapter(set(), (up, ones(4, 256), None, None, None, None)), ones(256, 256))

    assert problem(ones(256, 4)) is None
    assert problem(ones(256, 8)) == NO_PRODUCT


def test_layers_without_a_product_are_left_out(model, state, caplog):
    tensors = lora(state)
    expected = forward(load(with_lora(model, {k: t for k, t in tensors.items() if not k.startswith(LAYER)})))
    model.detach()
    patched = load(with_lora(model, tensors | {f"{LAYER}.lora_B.weight": ones(256, 16)}))
    assert torch.equal(forward(patched), expected)
    assert f"{LAYER}.weight {NO_PRODUCT}" in caplog.text


@pytest.mark.parametrize("alpha", [None, 4.0])
def test_the_constraint_of_oft_is_no_obstacle(model, alpha):
    blocks = torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(0)) / 100
    constraint = {} if alpha is None else {"alpha": torch.tensor(alpha)}
    assert with_lora(model, named(oft_blocks=blocks, **constraint)).patches.keys() == {f"{LAYER}.weight"}


def test_an_alpha_of_several_numbers_under_a_name_of_another_trainer(model):
    tensors = {"lora_A.default.weight": DOWN, "lora_B.default.weight": UP, "alpha": ones(2)}
    with pytest.raises(QuantError, match=r"whose .*self_attn\.o\.alpha has shape \(2,\), expected one number"):
        with_lora(model, {f"blocks.0.self_attn.o.{name}": tensor for name, tensor in tensors.items()})
