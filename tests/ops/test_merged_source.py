"""A MODEL with its LoRAs saved as one GGUF: the outputs stay the same, for a packed and a dense model."""

from __future__ import annotations

import weakref

import comfy.hooks
import comfy.sd
import pytest
import torch
from comfy.patcher_extension import PatcherInjection
from safetensors.torch import load_file

from wanquant.ops.budget.live_memory import LiveMemory
from wanquant.ops.loading.diffusion_model import load_diffusion_model
from wanquant.ops.merged_source import merged_checkpoint
from wanquant.ops.packed.layout import is_packed
from wanquant.quant import QuantError
from wanquant.quant.conversion.convert import convert
from wanquant.quant.gguf.reader import open_gguf
from wanquant.quant.plan import target_size as budget
from wanquant.tests.ops.packed.foreign_tensors import StandInGGMLTensor, with_foreign_weights
from wanquant.tests.ops.packed.test_patcher import forward, load, lora, with_lora

CPU = torch.device("cpu")
PATCHED, PLAIN, BIAS = "blocks.0.ffn.0.weight", "blocks.0.cross_attn.q.weight", "blocks.0.ffn.0.bias"


@pytest.fixture(scope="module")
def state(t2v):
    return load_file(t2v[0])


@pytest.fixture(params=["packed", "dense"])
def model(request, t2v):
    if request.param == "packed":
        return load_diffusion_model(t2v[1], dtype=torch.float32)
    return comfy.sd.load_diffusion_model(str(t2v[0]), {"dtype": torch.float32})


def save(patcher, path, recipe="F16", **settings):
    return convert(merged_checkpoint(patcher, CPU), path, recipe, **{"effort": "fast", **settings})


@pytest.mark.parametrize(("recipe", "bar"), [("BF16", 50), ("Q8_0", 35)])
def test_loaded_again_it_computes_the_same(model, state, tmp_path, sqnr, recipe, bar):
    patched = with_lora(with_lora(model, lora(state, bias=True), 0.8), lora(state, seed=1), -0.5)
    report = save(patched, tmp_path / "a.gguf", recipe)
    saved = forward(load(load_diffusion_model(report.path, dtype=torch.float32)))
    expected, without = forward(load(patched)), forward(load(model.clone()))
    assert sqnr(expected, saved) > bar
    assert sqnr(expected, without) < bar - 20, "the LoRA does something"


def test_sum_is_exact_and_encoded_once(model, state, tmp_path):
    tensors = lora(state, bias=True)
    with merged_checkpoint(with_lora(model, tensors, 0.7), CPU) as merged:
        assert merged.architecture == "wan"
        assert set(merged.tensors) == set(state)
        stem = "diffusion_model.blocks.0.ffn.0"
        up, down = (tensors[f"{stem}.lora_{part}.weight"].double() for part in "BA")
        base = model.model.diffusion_model.blocks[0].ffn[0].weight
        base = (base.dequantize() if is_packed(base) else base).double()
        expected = base + 0.7 / 2 * up @ down
        values = merged.tensors[PATCHED].read().view(expected.shape)
        torch.testing.assert_close(values, expected.float(), rtol=1e-6, atol=1e-6)
        bias = state[BIAS].float() + 0.7 * tensors[f"{stem}.diff_b"]
        torch.testing.assert_close(merged.tensors[BIAS].read(), bias, rtol=1e-6, atol=1e-7)


def test_slices_are_those_of_the_whole(model, state):
    with merged_checkpoint(with_lora(model, lora(state)), CPU) as merged:
        for name in (PATCHED, PLAIN):
            whole = merged.tensors[name].read()
            assert torch.equal(merged.tensors[name].read(512, 1024), whole[512:1024])


@pytest.mark.parametrize("memory", [None, 1], ids=["loaded", "low_vram"])
def test_weights_patched_in_place_are_not_patched_twice(model, state, memory):
    patched = with_lora(model, lora(state))
    with merged_checkpoint(patched, CPU) as merged:
        before = {name: merged.tensors[name].read().clone() for name in (PATCHED, PLAIN)}
    load(patched, memory)
    with merged_checkpoint(patched, CPU) as merged:
        assert all(torch.equal(merged.tensors[name].read(), values) for name, values in before.items())
    with merged_checkpoint(model, CPU) as unpatched:
        assert torch.equal(unpatched.tensors[PLAIN].read().float(), before[PLAIN].float())
        assert not torch.allclose(unpatched.tensors[PATCHED].read(), before[PATCHED])


def test_one_tensor_is_held_at_a_time(model, state):
    with merged_checkpoint(with_lora(model, lora(state)), CPU) as merged:
        first = merged.tensors[PATCHED].read()
        gone = weakref.ref(first.untyped_storage())
        del first
        merged.tensors["blocks.1.ffn.0.weight"].read()
        assert gone() is None


def test_result_is_reused_until_something_changes(model, state, tmp_path):
    tensors = lora(state)
    assert not save(with_lora(model, tensors, 0.5), tmp_path / "a.gguf").reused
    assert save(with_lora(model, tensors, 0.5), tmp_path / "a.gguf").reused
    for other in (with_lora(model, tensors, 0.6), with_lora(model, lora(state, seed=1), 0.5), model):
        with pytest.raises(QuantError, match="is not this conversion"):
            save(other, tmp_path / "a.gguf")


def test_target_size_and_importance(model, state, tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "_SAMPLED_ELEMENTS", 1 << 12)
    patched = with_lora(model, lora(state))
    importance = {PATCHED: torch.linspace(0.1, 10, 256)}
    report = save(patched, tmp_path / "a.gguf", target_size=0.004, importance=importance)
    assert report.nbytes <= 0.004 * (1 << 30)
    assert open_gguf(report.path).metadata["wanquant.source_name"] == "MODEL"


def test_model_that_was_quantized_is_warned_about(t2v, tmp_path):
    report = save(load_diffusion_model(t2v[1]), tmp_path / "a.gguf", "Q8_0")
    assert report.warnings == ("MODEL is quantized already (Q8_0), so that the errors of both quantizations add up",)


def test_patch_that_changes_a_shape_is_refused(t2v, tmp_path):
    model = load_diffusion_model(t2v[1]).clone()
    grown = (torch.ones(512, 300), {"pad_weight": True})
    model.add_patches({f"diffusion_model.{PATCHED}": ("diff", grown)})
    with pytest.raises(QuantError, match=r"blocks\.0\.ffn\.0\.weight: a patch changes its shape"):
        save(model, tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []


COMPILED = {
    "a block": ("diffusion_model.blocks.0",),
    "all blocks": ("diffusion_model.blocks.0", "diffusion_model.blocks.1"),
    "the model": ("diffusion_model",),
}


@pytest.mark.parametrize("parts", COMPILED.values(), ids=COMPILED)
def test_what_is_compiled_is_saved_as_without(model, state, parts):
    """torch.compile puts `_orig_mod.` into the names of the parameters; KJNodes compiles as here."""
    patched = with_lora(model, lora(state))
    with merged_checkpoint(patched, CPU) as merged:
        expected = {name: tensor.read().clone() for name, tensor in merged.tensors.items()}
    for part in parts:
        patched.add_object_patch(part, torch.compile(patched.get_model_object(part), backend="eager"))
    with merged_checkpoint(load(patched), CPU) as merged:
        assert list(merged.tensors) == list(expected)
        assert all(torch.equal(merged.tensors[name].read(), values) for name, values in expected.items())


def with_bypass(model, tensors):
    return comfy.sd.load_bypass_lora_for_models(model, None, tensors, 1.0, 0)[0]


def with_hook(model, tensors):
    return comfy.hooks.load_hook_lora_for_models(model.clone(), None, tensors, 1.0, 0)[0]


def with_injection(model, _):
    patched = model.clone()
    patched.set_injections("of_a_pack", [PatcherInjection(inject=print, eject=print)])
    return patched


def with_weight_function(model, _):
    patched = model.clone()
    patched.add_weight_wrapper(f"diffusion_model.{PLAIN}", torch.neg)
    return patched


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (with_bypass, "the injection 'bypass_lora'"),
        (with_hook, r"a LoRA of a hook \(Create Hook LoRA\)"),
        (with_injection, "the injection 'of_a_pack'"),
        (with_weight_function, rf"a function on 'diffusion_model\.{PLAIN}'"),
    ],
)
def test_what_is_not_a_patch_is_refused(model, state, change, named):
    with pytest.raises(QuantError, match=f"MODEL: has {named}, which cannot be merged .* Load LoRA"):
        merged_checkpoint(change(model, lora(state)), CPU)


def test_other_models_are_refused(t2v):
    model = load_diffusion_model(t2v[1])
    model.model.diffusion_model = torch.nn.Linear(2, 2)
    with pytest.raises(QuantError, match="MODEL: not a Wan model"):
        merged_checkpoint(model, CPU)


def test_packed_weights_without_patches_are_copied(t2v, state, tmp_path):
    model = load_diffusion_model(t2v[1], dtype=torch.float32)
    types = {name: tensor.qtype for name, tensor in open_gguf(t2v[1]).tensors.items()}
    report = save(with_lora(model, lora(state)), tmp_path / "a.gguf", types[PLAIN].name, effort="best")
    copied, merged = (open_gguf(report.path).tensors[name].data for name in (PLAIN, PATCHED))
    assert torch.equal(copied, open_gguf(t2v[1]).tensors[PLAIN].data)
    assert not torch.equal(merged, open_gguf(t2v[1]).tensors[PATCHED].data)


@pytest.mark.parametrize(("name", "times"), [(PLAIN, 0.3), (PATCHED, 4.1)])
def test_memory_is_a_few_times_the_weight_at_hand(t2v, state, name, times):
    model = with_lora(load_diffusion_model(t2v[1], dtype=torch.float32), lora(state))
    with merged_checkpoint(model, CPU) as merged, LiveMemory("cpu") as live:
        rows, columns = merged.tensors[name].shape
        for row in range(0, rows, rows // 4):
            merged.tensors[name].read(row * columns, (row + rows // 4) * columns)
    assert live.peak.nbytes <= times * 4 * rows * columns
    assert live.peak.nbytes <= 1.03 * merged.held_bytes, "what a conversion asks for before it begins"


@pytest.mark.parametrize("recipe", ["Q4_K_M", "Q8_0"])
def test_weights_of_another_pack_are_saved_by_value(t2v, state, tmp_path, recipe):
    gguf = convert(t2v[0], tmp_path / "source.gguf", recipe, effort="fast").path
    host_model = comfy.sd.load_diffusion_model(str(t2v[0]), {"dtype": torch.float32})
    foreign = with_foreign_weights(host_model, gguf)
    expected = {name: t.qtype.dequantize(t.data).flatten() for name, t in open_gguf(gguf).tensors.items()}
    with merged_checkpoint(foreign, CPU) as merged:
        assert merged.tensors[PLAIN].stored == open_gguf(gguf).tensors[PLAIN].qtype.name
        assert all(torch.equal(tensor.read().float(), expected[name]) for name, tensor in merged.tensors.items())
    tensors = lora(state)
    with merged_checkpoint(with_lora(foreign, tensors), CPU) as merged:
        patched = merged.tensors[PATCHED].read().clone()
    with merged_checkpoint(with_lora(load_diffusion_model(gguf), tensors), CPU) as ours:
        assert torch.equal(patched, ours.tensors[PATCHED].read())


def test_weights_of_another_pack_without_a_known_type_are_refused(t2v, tmp_path):
    def nameless(data, **claims):
        return StandInGGMLTensor(data, **claims | {"tensor_type": None})

    host_model = comfy.sd.load_diffusion_model(str(t2v[0]), {"dtype": torch.float32})
    with pytest.raises(QuantError, match=r"MODEL: tensor .*StandInGGMLTensor with torch.uint8 data is not understood"):
        save(with_foreign_weights(host_model, t2v[1], nameless), tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []
