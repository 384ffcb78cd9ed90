"""LoRAs of another model: refused, or left out by name."""

from __future__ import annotations

import comfy.hooks
import pytest
import torch

from wanquant.quant import QuantError
from wanquant.tests.ops.packed.patching import forward, functions, load, lora, with_lora

STEM = "diffusion_model.blocks.0.ffn.0"


def of_other_width(tensors, stem=""):
    return {key: t.repeat(1, 2) if key.startswith(stem) and "lora_A" in key else t for key, t in tensors.items()}


def of_other_names(count):
    return {f"lora_unet_down_blocks_{i}_proj_in.lora_up.weight": torch.zeros(320, 4) for i in range(count)}


def test_names_of_another_model(model, decoded):
    with_lora(decoded, of_other_names(9))
    for count, more in ((5, " and 2 more"), (1, "")):
        named = ", ".join(list(of_other_names(count))[:3])
        with pytest.raises(QuantError) as refusal:
            with_lora(model, of_other_names(count))
        assert f"none of its {count} tensors ({named}{more}) names a weight of this one" in str(refusal.value)


def test_names_of_another_model_that_nobody_logged(model):
    with pytest.raises(QuantError, match="none of its tensors names a weight of this one"):
        model.clone().add_patches({})


def test_sizes_of_another_model(model, state):
    message = r"10 of its 10 patches .*self_attn.q.weight for 131,072 weights, not 65,536.* and 7 more"
    with pytest.raises(QuantError, match=message):
        with_lora(model, of_other_width(lora(state)))


def test_a_hook_of_another_model(model, state):
    hooks = comfy.hooks.create_hook_lora(lora=of_other_width(lora(state)), strength_model=1.0, strength_clip=0)
    target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
    with pytest.raises(QuantError, match="10 of its 10 patches do not fit this model"):
        model.register_all_hook_patches(hooks, target)


@pytest.mark.parametrize("suffix", ["diff", "set_weight"])
def test_difference_of_another_size(suffix, model):
    with pytest.raises(QuantError, match="1 of its 1 patches do not fit"):
        with_lora(model, {f"{STEM}.{suffix}": torch.zeros(5, 5)})


def test_layers_that_do_not_fit_are_left_out_and_named(model, state, caplog):
    tensors = lora(state)
    expected = forward(load(with_lora(model, {k: t for k, t in tensors.items() if not k.startswith(STEM)})))
    model.detach()
    patched = load(with_lora(model, of_other_width(tensors, STEM)))
    assert len(functions(patched)) == 9
    assert torch.equal(forward(patched), expected)
    (message,) = (r.getMessage() for r in caplog.records if "partly of another model" in r.getMessage())
    assert f"1 of its 10 patches do not fit this model: {STEM}.weight" in message


def test_a_text_encoders_patches_are_no_misfits(model):
    model.add_patches({"t5xxl.transformer.shared.weight": ("diff", (torch.zeros(3),))})
    assert model.patches == {}
