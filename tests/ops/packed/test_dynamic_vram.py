"""The host's dynamic VRAM code on packed weights, with CPU tensors standing in for its pages of video memory.

What this cannot show without an accelerator: the transfers, streams, pins and page faults themselves.
"""

from __future__ import annotations

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.pinned_memory
import comfy.sd
import comfy_aimdo.host_buffer
import comfy_aimdo.model_vbar
import comfy_aimdo.torch
import pytest
import torch
from comfy.patcher_extension import WrapperExecutor
from safetensors.torch import load_file

from wanquant.ops.budget.resident import keep_weights
from wanquant.ops.budget.sampling import _time_projection_in_main_memory
from wanquant.ops.loading.diffusion_model import load_diffusion_model
from wanquant.ops.loading.prefetch import prefetch_blocks
from wanquant.ops.packed.layout import is_packed
from wanquant.ops.packed.linear import packed_modules
from wanquant.ops.packed.patches import OnTheFly
from wanquant.quant import QTYPES

CPU = torch.device("cpu")
DEVICE = torch.device("cpu", 0)
"""A device that compares as another one, but is the same for torch."""

KEY = "diffusion_model.blocks.0.ffn.0.weight"


class StandInVBAR:
    """A stand-in whose pages are CPU tensors that are always resident."""

    def __init__(self, size, device, **_):
        pass

    def alloc(self, size):
        return torch.zeros(size, dtype=torch.uint8)

    def prioritize(self):
        pass

    def loaded_size(self):
        return 0

    def free_memory(self, size):
        return 0


class StandInHostBuffer:
    size = 0

    def __init__(self, *sizes):
        pass


@pytest.fixture
def dynamic(t2v, monkeypatch):
    """A patcher of the host's dynamic class, for a device that is not the CPU."""
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcherDynamic)
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: DEVICE)
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: device == CPU)
    monkeypatch.setattr(comfy_aimdo.host_buffer, "HostBuffer", StandInHostBuffer)
    monkeypatch.setattr(comfy_aimdo.model_vbar, "ModelVBAR", StandInVBAR)
    monkeypatch.setattr(comfy_aimdo.model_vbar, "vbar_fault", lambda page: 1)
    monkeypatch.setattr(comfy_aimdo.model_vbar, "vbar_signature_compare", lambda now, before: now == before)
    monkeypatch.setattr(comfy_aimdo.model_vbar, "vbar_unpin", lambda page: None)
    monkeypatch.setattr(comfy_aimdo.torch, "aimdo_to_tensor", lambda page, device: page)
    monkeypatch.setattr(comfy.pinned_memory, "get_pin", lambda module, subset="weights": None)
    monkeypatch.setattr(comfy.pinned_memory, "pin_memory", lambda module, subset="weights", size=None: False)
    patcher = load_diffusion_model(t2v[1], dtype=torch.float32)
    assert patcher.is_dynamic()
    return patcher


@pytest.fixture
def lora(t2v):
    state = load_file(t2v[0])
    stems = ["blocks.0.ffn.0", "blocks.1.self_attn.q"]
    factors = {f"diffusion_model.{s}.lora_A.weight": torch.randn(4, state[f"{s}.weight"].shape[1]) / 16 for s in stems}
    return factors | {
        f"diffusion_model.{s}.lora_B.weight": torch.randn(state[f"{s}.weight"].shape[0], 4) / 16 for s in stems
    }


def load(patcher):
    patcher.partially_load(patcher.load_device)
    return dict(packed_modules(patcher.model))


def cast(module):
    """Cast as comfy.ops.cast_bias_weight does for a weight of dynamic VRAM."""
    comfy.ops.cast_modules_with_vbar([module], torch.float32, CPU, torch.float32, False)
    weight, _ = comfy.ops.resolve_cast_module_with_vbar(module, torch.float32, CPU, torch.float32, torch.float32, False)
    return weight


def test_weights_reach_the_pages_packed(dynamic):
    module = load(dynamic)[KEY]
    for _ in range(2):
        weight = cast(module)
        assert is_packed(weight)
        assert torch.equal(weight._qdata, module.weight._qdata)
        assert weight._qdata.data_ptr() == module._v.data_ptr()


def test_lora_is_applied_at_every_use_and_never_written_to_the_pages(dynamic, lora):
    patched, _ = comfy.sd.load_lora_for_models(dynamic, None, lora, 1.0, 0)
    modules = load(patched)
    assert sum(len(module.weight_function) for module in modules.values()) == 2
    module, stem = modules[KEY], KEY.removesuffix(".weight")
    assert module.weight_lowvram_function is None
    exact = QTYPES["Q8_0"].dequantize(module.weight._qdata)
    exact += lora[f"{stem}.lora_B.weight"] @ lora[f"{stem}.lora_A.weight"]
    for _ in range(3):
        torch.testing.assert_close(cast(module), exact, atol=1e-6, rtol=1e-6)
        assert torch.equal(module._v_weight._qdata, module.weight._qdata)


def test_loras_follow_the_patcher_that_is_loaded(dynamic, lora):
    patched, _ = comfy.sd.load_lora_for_models(dynamic, None, lora, 1.0, 0)
    assert type(patched) is type(dynamic)
    base = load(dynamic)[KEY]
    expected = cast(base).dequantize()
    assert not torch.equal(cast(load(patched)[KEY]), expected)
    load(patched)
    assert [type(f) for f in base.weight_function] == [OnTheFly]
    assert torch.equal(cast(load(dynamic)[KEY]).dequantize(), expected)
    assert base.weight_function == []


def held(patcher):
    return sum(f.size() for _, m in packed_modules(patcher.model) for f in m.weight_function if f._held)


def test_factors_are_held_by_budget_and_given_back(dynamic, lora):
    patched, _ = comfy.sd.load_lora_for_models(dynamic, None, lora, 1.0, 0)
    modules = load(patched)
    expected, sizes = cast(modules[KEY]), [lora[name].nbytes for name in lora]
    for budget, taken in ((0, 0), (sum(sizes) - 1, max(sizes[0] + sizes[2], sizes[1] + sizes[3])), (1e9, sum(sizes))):
        load(patched)
        before = patched.loaded_size()
        assert patched.keep_factors_on_device(DEVICE, budget) == held(patched) == patched.loaded_size() - before
        assert held(patched) == taken
        assert torch.equal(cast(modules[KEY]), expected)
        assert patched.partially_unload(CPU, 1 << 40) == before + taken
        assert held(patched) == patched.loaded_size() == 0


def test_what_is_held_leaves_less_for_weights(dynamic, lora, monkeypatch):
    patched, _ = comfy.sd.load_lora_for_models(dynamic, None, lora, 1.0, 0)
    load(patched)
    limits = []
    monkeypatch.setattr(StandInVBAR, "set_watermark_limit", lambda _, nbytes: limits.append(nbytes), raising=False)
    keep_weights(patched, 1 << 20)
    assert limits == [(1 << 20) - held(patched)]
    assert held(patched) == sum(factor.nbytes for factor in lora.values())


def test_legacy_delegate_for_torch_compile_and_hooks(dynamic, lora):
    patched, _ = comfy.sd.load_lora_for_models(dynamic, None, lora, 1.0, 0)
    legacy = patched.get_non_dynamic_delegate()
    assert not legacy.is_dynamic()
    legacy.load_device = CPU
    legacy.patch_model(CPU)
    assert sum(len(module.weight_function) for _, module in packed_modules(legacy.model)) == 2
    again = patched.get_non_dynamic_delegate()
    assert again.model is legacy.model


def test_copy_for_another_device_of_the_multi_gpu_node(dynamic, lora):
    patched, _ = comfy.sd.load_lora_for_models(dynamic, None, lora, 1.0, 0)
    expected = cast(load(patched)[KEY])
    other = patched.deepclone_multigpu(torch.device("cpu", 1))
    assert other.is_dynamic()
    assert type(other) is type(dynamic)
    assert other.model is not patched.model
    assert torch.equal(cast(load(other)[KEY]), expected)


@pytest.fixture
def streams(monkeypatch):
    """The host's prefetch queue, without its streams and pins."""
    monkeypatch.setattr(comfy.model_management, "NUM_STREAMS", 2)
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(comfy.model_management, "device_supports_non_blocking", lambda device: True)
    monkeypatch.setattr(comfy.model_management, "get_offload_stream", lambda device: None)
    monkeypatch.setattr(comfy.model_management, "sync_stream", lambda device, stream: None)
    monkeypatch.setattr(comfy.model_management, "ensure_pin_registerable", lambda size: None)


def forward(patcher, **options):
    """Call the model as the host does, with the patcher's wrappers in its options."""
    generator = torch.Generator().manual_seed(1)
    x, text = (torch.randn(shape, generator=generator) for shape in [(1, 16, 2, 8, 8), (1, 7, 4096)])
    options = {"wrappers": patcher.wrappers, "prefetch_dynamic_vbars": True} | options
    with torch.no_grad():
        return patcher.model.diffusion_model(x, torch.tensor([500.0]), text, transformer_options=options)


def prefetched(patcher):
    """Return the blocks whose packed layers have all been copied or are being copied."""
    blocks = patcher.model.diffusion_model.blocks
    return [i for i, block in enumerate(blocks) if all(hasattr(m, "_prefetch") for _, m in packed_modules(block))]


def test_blocks_are_prefetched_whole(dynamic, lora, streams):
    patched, _ = comfy.sd.load_lora_for_models(dynamic, None, lora, 1.0, 0)
    load(patched)
    expected, seen = forward(patched, prefetch_dynamic_vbars=False), []
    for block in patched.model.diffusion_model.blocks:
        block.register_forward_pre_hook(lambda *_: seen.append(prefetched(patched)))
    assert torch.equal(forward(patched), expected)
    assert seen == [[0], [1]]
    assert prefetched(patched) == []


def test_blocks_that_a_node_replaces_are_not_prefetched(dynamic, streams):
    load(dynamic)
    expected, seen = forward(dynamic, prefetch_dynamic_vbars=False), []

    def replacement(args, extra):
        seen.append(prefetched(dynamic))
        return extra["original_block"](args)

    replaced = {"dit": {("double_block", 0): replacement}}
    assert torch.equal(forward(dynamic, patches_replace=replaced), expected)
    assert seen == [[]]
    assert list(replaced["dit"]) == [("double_block", 0)]


@pytest.mark.parametrize("some", [0, 1])
def test_no_block_is_held_that_a_node_leaves_out(some, dynamic, streams):
    """Skip blocks with another forward, as nodes do that cache a step."""
    load(dynamic)

    def cached(x, options):
        for index in range(some):
            x = options["patches_replace"]["dit"]["double_block", index](x, {"original_block": lambda x: x})
        return x

    model = dynamic.model.diffusion_model
    executor = WrapperExecutor.new_class_executor(cached, model, [prefetch_blocks])
    executor.execute(torch.zeros(1), {"prefetch_dynamic_vbars": True})
    assert not [key for key, module in packed_modules(dynamic.model) if hasattr(module, "_prefetch")]


def test_small_layers_are_made_resident_with_the_lora_in_them(dynamic, t2v, tmp_path, write_gguf):
    """The host moves modules up to 16 KiB to the device, dequantized; unloading restores the packed weights."""
    small = "blocks.0.self_attn.q.weight"
    types = {small: "TQ1_0"}
    path = write_gguf(tmp_path / "a.gguf", load_file(t2v[0]), lambda name, tensor: types.get(name, "F32"))
    patched = load_diffusion_model(path, dtype=torch.float32)
    ((key, module),) = packed_modules(patched.model)
    patched.add_patches({key: ("diff", (torch.ones(256, 256),))})
    expected = module.weight.dequantize() + 1
    for _ in range(2):
        load(patched)
        assert not is_packed(module.weight)
        assert module.weight_function == []
        torch.testing.assert_close(module.weight.detach(), expected)
        patched.unpatch_model(CPU)
        assert is_packed(module.weight)


@pytest.mark.parametrize("stored", ["Q8_0", "BF16"])
def test_the_time_projection_in_main_memory_keeps_its_patches(stored, dynamic, t2v, tmp_path, write_gguf):
    """The host leaves patches out where it casts a weight of dynamic VRAM for the CPU."""
    path = write_gguf(
        tmp_path / "a.gguf", load_file(t2v[0]), lambda name, tensor: stored if tensor.ndim == 2 else "F32"
    )
    patched = load_diffusion_model(path, dtype=torch.float32)
    layer, x = patched.model.diffusion_model.time_projection[-1], torch.randn(1, 256)
    weight, bias = (torch.randn(parameter.shape) for parameter in (layer.weight, layer.bias))
    expected = layer(x) + torch.nn.functional.linear(x, weight, bias)
    patched.add_patches(
        {
            f"diffusion_model.time_projection.1.{name}": ("diff", (patch,))
            for name, patch in (("weight", weight), ("bias", bias))
        }
    )
    load(patched)
    with _time_projection_in_main_memory(patched.model.diffusion_model, unless=False):
        torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)
