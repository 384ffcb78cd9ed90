"""LoRAs for another model: refused, or left out by name."""

from __future__ import annotations

import logging

import comfy.hooks
import pytest
import torch

from wanquant.ops.loading.diffusion_model import load_diffusion_model
from wanquant.quant import QuantError
from wanquant.tests.ops.packed.patching import forward, functions, load, lora, with_lora

STEM = "diffusion_model.blocks.0.ffn.0"


def of_other_width(tensors, stem=""):
    return {key: t.repeat(1, 2) if key.startswith(stem) and "lora_A" in key else t for key, t in tensors.items()}


def of_other_names(count):
    return {f"lora_unet_down_blocks_{i}_proj_in.lora_up.weight": torch.zeros(320, 4) for i in range(count)}


def test_names_of_another_model(model, caplog):
    """The refusal points to the host's log, which has the names."""
    with pytest.raises(QuantError, match=r"none of its tensors names a weight of this model \(ComfyUI's log lists"):
        with_lora(model, of_other_names(5))
    assert [r.getMessage() for r in caplog.records] == [f"lora key not loaded: {key}" for key in of_other_names(5)]


def test_patches_are_checked_without_listening_to_the_log(t2v):
    before = [(logger, list(logger.handlers)) for logger in (logging.getLogger(), logging.getLogger("wanquant"))]
    model = load_diffusion_model(t2v[1])
    assert all(logger.handlers == handlers for logger, handlers in before)
    assert not model.model._state_dict_pre_hooks


def test_a_lora_is_judged_by_its_own_tensors(model, decoded, state):
    """What the host logs of LoRAs for other models does not count."""
    with_lora(decoded, of_other_names(9))
    assert len(with_lora(model, lora(state)).patches) == 10


def test_sizes_of_another_model(model, state):
    message = (
        r"10 of its 10 patches .*q.weight has 131,072 elements in the LoRA and 65,536 in the model, .*, and 7 more"
    )
    with pytest.raises(QuantError, match=message):
        with_lora(model, of_other_width(lora(state)))


def test_a_hook_of_another_model(model, state):
    hooks = comfy.hooks.create_hook_lora(lora=of_other_width(lora(state)), strength_model=1.0, strength_clip=0)
    target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
    with pytest.raises(QuantError, match="no match in this model for 10 of its 10 patches"):
        model.register_all_hook_patches(hooks, target)


@pytest.mark.parametrize("suffix", ["diff", "set_weight"])
def test_difference_of_another_size(suffix, model):
    with pytest.raises(QuantError, match="no match in this model for 1 of its 1 patch "):
        with_lora(model, {f"{STEM}.{suffix}": torch.zeros(5, 5)})


def test_layers_that_do_not_match_are_left_out_and_named(model, state, caplog):
    tensors = lora(state)
    expected = forward(load(with_lora(model, {k: t for k, t in tensors.items() if not k.startswith(STEM)})))
    model.detach()
    patched = load(with_lora(model, of_other_width(tensors, STEM)))
    assert len(functions(patched)) == 9
    assert torch.equal(forward(patched), expected)
    (message,) = (r.getMessage() for r in caplog.records if "partly for another model" in r.getMessage())
    assert f"no match in this model for 1 of its 10 patches ({STEM}.weight has" in message


def test_a_text_encoders_patches_are_not_mismatches(model):
    model.add_patches({"t5xxl.transformer.shared.weight": ("diff", (torch.zeros(3),))})
    assert model.patches == {}
