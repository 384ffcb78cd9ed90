"""LoRAs and other patches on packed weights, through the host's functions, in every order in which it calls them."""

from __future__ import annotations

from itertools import pairwise

import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy.model_patcher import LowVramPatch

from wanquant.ops.packed.layout import is_packed
from wanquant.ops.packed.linear import packed_modules
from wanquant.ops.packed.patches import OnTheFly
from wanquant.quant import QuantError
from wanquant.tests.ops.packed.patching import CPU, KEY, blocks, forward, functions, load, lora, with_lora


def test_weights_stay_packed_and_nothing_dense_is_kept(model, state):
    before, size = blocks(model), model.model_size()
    patched = load(with_lora(model, lora(state)))
    forward(patched)
    assert patched.backup == {}
    assert comfy.model_management.module_size(patched.model) == size
    after = blocks(patched)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_unloading_restores_the_base_exactly(model, state):
    expected, before = forward(load(model)), blocks(model)
    patched = load(with_lora(model, lora(state, bias=True)))
    assert not torch.equal(forward(patched), expected)
    patched.detach()
    assert functions(patched) == []
    assert torch.equal(forward(load(model)), expected)
    assert all(torch.equal(value, before[key]) for key, value in blocks(model).items())


def test_compiled_blocks_keep_their_lora(model, state):
    """torch.compile puts `_orig_mod.` into the keys of the layers, as KJNodes uses it."""
    tensors = lora(state)
    expected = forward(load(with_lora(model, tensors)))
    model.detach()
    patched = with_lora(model, tensors)
    for key in ("diffusion_model.blocks.0", "diffusion_model.blocks.1"):
        patched.add_object_patch(key, torch.compile(patched.get_model_object(key), backend="eager"))
    torch.testing.assert_close(forward(load(patched)), expected)


def test_no_second_lora_after_partial_unload_and_reload(model, state):
    patched = load(with_lora(model, lora(state, bias=True)))
    expected = forward(patched)
    for _ in range(2):
        assert patched.partially_unload(CPU, 1 << 20) > 0
        assert len(functions(patched)) == 10
        assert not any(isinstance(f, LowVramPatch) for f in functions(patched))
        assert torch.equal(forward(patched), expected)
        load(patched)
        assert len(functions(patched)) == 10
        assert torch.equal(forward(patched), expected)


@pytest.mark.parametrize("memory", [1, 300_000, 1_500_000])
def test_low_vram_load_then_more_memory(memory, model, state):
    expected = forward(load(with_lora(model, lora(state, bias=True))))
    model.detach()
    patched = load(with_lora(model, lora(state, bias=True)), memory)
    assert patched.model.model_lowvram
    assert torch.equal(forward(patched), expected)
    load(patched)
    assert torch.equal(forward(patched), expected)


def test_clones_share_the_model_and_swap_their_patches(model, state):
    first, second = with_lora(model, lora(state, seed=1)), with_lora(model, lora(state, seed=2))
    assert first.model is second.model is model.model
    assert type(first) is type(first.clone()) is type(model)
    outputs = [forward(load(patcher)) for patcher in (model, first, second)]
    assert not any(torch.equal(a, b) for a, b in pairwise(outputs))
    for patcher, output in zip((first, model, second), (outputs[1], outputs[0], outputs[2]), strict=True):
        assert torch.equal(forward(load(patcher)), output)
    model.cleanup()  # This clone is not loaded; the loaded one must not change.
    assert torch.equal(forward(second), outputs[2])


def test_through_the_hosts_memory_manager(model, state):
    expected = forward(load(with_lora(model, lora(state))))
    model.detach()
    patched = with_lora(model, lora(state))
    comfy.model_management.load_models_gpu([patched])
    assert torch.equal(forward(patched), expected)
    comfy.model_management.unload_all_models()
    assert functions(patched) == []


@pytest.mark.parametrize("state_of_vram", ["NORMAL_VRAM", "LOW_VRAM", "NO_VRAM"])
def test_memory_modes_of_the_host(state_of_vram, model, state, monkeypatch):
    """Test --lowvram and --novram, with the CPU as an accelerator."""
    expected = forward(load(with_lora(model, lora(state))))
    model.detach()
    host = comfy.model_management
    monkeypatch.setattr(host, "is_device_cpu", lambda device: device == torch.device("meta"))
    monkeypatch.setattr(host, "vram_state", host.VRAMState[state_of_vram])
    patched = with_lora(model, lora(state))
    host.load_models_gpu([patched])
    assert patched.model.model_lowvram == (state_of_vram == "NO_VRAM")
    assert torch.equal(forward(patched), expected)
    host.unload_all_models()
    assert functions(patched) == []


def test_wrapper_patches_of_other_nodes_keep_their_place(model, state):
    patched = with_lora(model, lora(state))
    patched.add_weight_wrapper(KEY, lambda weight: weight * 0)
    load(patched)
    _, module = next((key, m) for key, m in packed_modules(patched.model) if key == KEY)
    assert [isinstance(f, OnTheFly) for f in module.weight_function] == [True, False]
    patched.partially_unload(CPU, 1 << 20)
    assert len(module.weight_function) == 2


def test_class_and_callback_survive_a_legacy_downgrade(model, state):
    """The host does this for torch.compile and hooks: a new model gets the patches of the old one."""
    patched = with_lora(model, lora(state))
    expected = forward(load(patched))

    class Dynamic(type(patched)):
        def is_dynamic(self):
            return True

    patched.__class__ = Dynamic
    legacy = patched.clone(disable_dynamic=True)
    patched.__class__ = Dynamic.__mro__[1]
    assert not legacy.is_dynamic()
    assert legacy.model is not patched.model
    assert torch.equal(forward(load(legacy)), expected)
    assert len(functions(legacy)) == 10


def test_model_merge_reads_decoded_weights(model):
    ((weight, convert),) = model.get_key_patches("diffusion_model.blocks.0.ffn.0.weight")[KEY]
    assert torch.equal(convert(weight, inplace=True), weight.dequantize())
    other = model.clone()
    other.add_patches(
        {KEY: model.get_key_patches()[KEY]}, 0.25, 0.75
    )  # A quarter of itself, as nodes that merge models do.
    expected = forward(load(model))
    torch.testing.assert_close(forward(load(other)), expected, atol=1e-5, rtol=1e-5)


def test_a_clone_of_the_plain_class_becomes_ours_when_it_loads(model, state):
    expected = forward(load(with_lora(model, lora(state))))
    model.detach()
    stray = with_lora(model, lora(state))
    stray.__class__ = comfy.model_patcher.ModelPatcher
    torch.testing.assert_close(forward(load(stray)), expected, atol=2e-4, rtol=2e-4)
    stray.detach()
    load(stray)
    assert stray.backup == {}
    assert torch.equal(forward(stray), expected)


def test_patches_added_after_loading_wait_for_the_next_load(model, state):
    patched = load(with_lora(model, lora(state)))
    expected = forward(patched)
    patched.add_patches({KEY: ("diff", (torch.ones(512, 256),))})
    patched.sync()
    assert torch.equal(forward(patched), expected)
    assert not torch.equal(forward(load(patched)), expected)


def test_saving_is_refused(model):
    with pytest.raises(QuantError, match="cannot be saved as safetensors"):
        model.state_dict_for_saving()


# Without an accelerator: a second CPU device, which the host treats as one, shows what is counted and moved.


def test_factors_move_and_are_accounted(model, state, monkeypatch):
    """Make the host treat the CPU as an accelerator, so that it moves tensors and counts them."""
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: device == torch.device("meta"))
    patched = with_lora(model, lora(state))
    load(patched)
    moved = sum(f.size() for f in functions(patched))
    assert moved == sum(t.nbytes for n, t in lora(state).items() if "lora_" in n)
    assert patched.model.model_loaded_weight_memory == patched.model_size() + moved
    for function in functions(patched):
        assert function.move_to(torch.device("meta")) == function.size()
        assert function.move_to(torch.device("meta")) == 0


def test_factors_stay_away_when_memory_is_short(model, state, monkeypatch):
    """A partial load moves LoRAs only within its budget; the CPU is the accelerator, as above."""
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: device == torch.device("meta"))
    patched = with_lora(model, lora(state))
    budget = patched.model_size() // 2
    load(patched, budget)
    assert patched.model.model_loaded_weight_memory <= budget


# Dynamic VRAM needs an accelerator, so these tests set the attributes that its loading sets.


def test_dynamic_vram_state_is_rewritten(model, state):
    patched = load(with_lora(model, lora(state)))
    for key, module in packed_modules(patched.model):
        module.weight_function = []
        module.weight_lowvram_function = LowVramPatch(key, patched.patches) if key in patched.patches else None
    patched.sync()
    assert len(functions(patched)) == 10
    assert all(module.weight_lowvram_function is None for _, module in packed_modules(patched.model))


def test_tiny_layer_that_dynamic_vram_makes_resident(model, state):
    """The host sets a dense, patched weight for `force_cast`, and later restores the packed one from its backup."""
    patched = load(with_lora(model, lora(state)))
    expected = forward(patched)
    patched.patch_weight_to_device(KEY, device_to=CPU, force_cast=True)
    patched.sync()
    assert not is_packed(comfy.utils.get_attr(patched.model, KEY))
    torch.testing.assert_close(forward(patched), expected, atol=2e-4, rtol=2e-4)
