"""Hooks: the host switches LoRAs between conditionings during sampling."""

from __future__ import annotations

import comfy.hooks
import pytest
import torch

from wanquant.tests.ops.packed.patching import forward, functions, load, lora, with_lora


def hook_group(patcher, tensors, strength=1.0):
    group = comfy.hooks.create_hook_lora(lora=tensors, strength_model=strength, strength_clip=0)
    patcher.register_all_hook_patches(group, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model))
    return group


@pytest.mark.parametrize("mode", list(comfy.hooks.EnumHookMode), ids=lambda mode: mode.name)
def test_hooks(mode, model, state):
    base = forward(load(model))
    expected = forward(load(with_lora(model, lora(state, bias=True), 0.5)))
    patched = model.clone()
    patched.set_hook_mode(mode)
    group = hook_group(patched, lora(state, bias=True), 0.5)
    load(patched)
    for _ in range(2):
        patched.apply_hooks(group)
        torch.testing.assert_close(forward(patched), expected, atol=1e-5, rtol=1e-5)
        patched.apply_hooks(None)
        torch.testing.assert_close(forward(patched), base)
    patched.cleanup()
    assert functions(patched) == []


def test_hooks_add_to_the_loras_of_the_model(model, state):
    first, second = lora(state, seed=1), lora(state, seed=2)
    expected = forward(load(with_lora(with_lora(model, first), second)))
    patched = with_lora(model, first)
    group = hook_group(patched, second)
    load(patched)
    patched.apply_hooks(group)
    torch.testing.assert_close(forward(patched), expected, atol=1e-5, rtol=1e-5)
