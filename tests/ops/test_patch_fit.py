"""LoRAs of another model: refused, or left out by name."""

from __future__ import annotations

import pytest
import torch

from wanquant.quant import QuantError
from wanquant.tests.ops.patching import forward, functions, load, lora, with_lora

STEM = "diffusion_model.blocks.0.ffn.0"


def of_other_width(tensors, stem=""):
    return {key: t.repeat(1, 2) if key.startswith(stem) and "lora_A" in key else t for key, t in tensors.items()}


def test_names_of_another_model(model):
    foreign = {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight": torch.zeros(320, 4)}
    with pytest.raises(QuantError, match="none of its tensors names a weight"):
        with_lora(model, foreign)


def test_sizes_of_another_model(model, state):
    message = r"10 of its 10 patches .*self_attn.q.weight for 131,072 weights, not 65,536.* and 7 more"
    with pytest.raises(QuantError, match=message):
        with_lora(model, of_other_width(lora(state)))


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
