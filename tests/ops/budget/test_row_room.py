"""8-bit rows are kept over a sampling in what the budget leaves over: the same bits, made once, gone afterwards."""

from __future__ import annotations

import logging
from collections import Counter

import comfy.model_management
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy.weight_adapter import LoRAAdapter
from comfy_api.torch_helpers import set_torch_compile_wrapper

from wanquant.ops.budget import row_room, sampling
from wanquant.ops.budget.choose_plan import ChosenPlan
from wanquant.ops.budget.live_memory import LiveMemory
from wanquant.ops.budget.sampling import with_budget
from wanquant.ops.budget.sampling_job import SamplingJob
from wanquant.ops.budget.simulator import Simulator
from wanquant.ops.lean import MemoryPlan
from wanquant.ops.loading.diffusion_model import load_diffusion_model
from wanquant.ops.packed import int8
from wanquant.ops.packed.kept_rows import row_bytes
from wanquant.ops.packed.linear import packed_modules
from wanquant.tests.ops.budget.test_sampling import AMPLE, JOB, SHAPE, sample
from wanquant.tests.ops.budget.test_simulator import FlashAttention, FusedNorms, without_temporaries

pytest.importorskip("comfy_kitchen.tensor.int8", reason="this ComfyUI has no INT8 arithmetic")

FORWARDS = 4
"""Of `sample`: two steps with two prompts each."""


@pytest.fixture(scope="module")
def model(t2v):
    with torch.inference_mode():
        return load_diffusion_model(t2v[1], dtype=torch.float32, precision="int8")


def with_lora(model, strength):
    generator = torch.Generator().manual_seed(1)
    up, down = (torch.randn(shape, generator=generator) / 16 for shape in ((512, 8), (8, 256)))
    patched = model.clone()
    lora = LoRAAdapter(set(), (up, down, None, None, None, None))
    patched.add_patches({f"diffusion_model.blocks.{index}.ffn.0.weight": lora for index in range(2)}, strength)
    return patched


@pytest.fixture
def made(model, monkeypatch):
    """Return the counter of the rows that are made of each layer."""
    layers = {layer.weight._qdata.data_ptr(): key for key, layer in packed_modules(model.model)}
    made, make = Counter(), int8.int8_rows_into

    def count(packed, *arguments):
        if packed.is_meta:  # in a prediction
            return make(packed, *arguments)
        made[layers[max(start for start in layers if start <= packed.data_ptr())]] += len(packed)
        return make(packed, *arguments)

    monkeypatch.setattr(int8, "int8_rows_into", count)
    return made


@pytest.fixture
def kept(monkeypatch):
    """Return the list of what samplings keep."""
    kept, keep = [], sampling.keep_rows

    def note(*arguments):
        kept.append(keep(*arguments))
        return kept[-1]

    monkeypatch.setattr(sampling, "keep_rows", note)
    return kept


def without_keeping(model, budget=AMPLE):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "keep_rows", lambda *_: None)
        return sample(with_budget(model, budget))


@pytest.fixture(scope="module")
def expected(model):
    """Return the result of ComfyUI's own forward that keeps nothing."""
    return without_keeping(model)


def room_of(model, budget=AMPLE, plan=None):
    return row_room.row_room(model, JOB, Simulator.from_patcher(model).peak(JOB, plan), budget)


def all_rows(model, layers):
    """Return how many rows each of the layers has, by key."""
    return {key: len(layer.weight) for key, layer in packed_modules(model.model) if layer in layers}


def nothing_is_left(model, kept):
    layers = [layer for _, layer in packed_modules(model.model)]
    return not any({"multiply", "hold"} & set(vars(layer)) for layer in layers) and not any(
        each.used_bytes for each in kept if each
    )


PLANS = [None, MemoryPlan(2, 320), MemoryPlan(2, 320, 1)]


@pytest.mark.parametrize("strength", [None, 0.5], ids=["plain", "lora"])
@pytest.mark.parametrize("plan", PLANS, ids=["stock", "lean", "recomputed"])
def test_same_bits_with_each_row_made_once(plan, strength, model, made, kept, monkeypatch):
    patched = model if strength is None else with_lora(model, strength)
    chosen = ChosenPlan(plan, Simulator.from_patcher(patched).peak(JOB, plan), 1.0)
    monkeypatch.setattr(sampling, "choose_plan", lambda *_, **__: chosen)
    expected = without_keeping(patched)
    each_time = Counter(made)
    made.clear()
    assert torch.equal(sample(with_budget(patched, AMPLE)), expected)
    rows = all_rows(model, room_of(model).layers)
    assert set(made) == set(rows), "all layers but those of the prompt, and no other"
    if plan != PLANS[-1]:  # There, some rows of the keys are made a second time, and take the room of the last layer.
        assert made == rows
        assert each_time == {key: FORWARDS * count for key, count in rows.items()}
    assert made.total() < each_time.total() / 2
    assert len(kept) == 1 and nothing_is_left(model, kept)


def test_a_smaller_room_keeps_the_first_blocks(model, expected, made, kept):
    everything = room_of(model)
    half = everything.total_bytes - everything.nbytes // 2
    assert room_of(model, half).nbytes == everything.nbytes - everything.nbytes // 2
    assert torch.equal(sample(with_budget(model, half)), expected)
    rows = all_rows(model, everything.layers)
    once = [key for key in rows if made[key] == rows[key]]
    assert {key for key in rows if "blocks.0." in key} <= set(once) < set(rows)
    assert all(made[key] == FORWARDS * rows[key] for key in rows if key not in once)


def test_the_peak_is_within_the_budget(model, kept, monkeypatch):
    """Weights and CUDA's context are not seen here, and are added."""
    monkeypatch.setattr(int8, "int8_rows_into", without_temporaries(int8.int8_rows_into))
    sample(model)  # which loads the weights
    kept.clear()
    everything, peak = room_of(model), Simulator.from_patcher(model).peak(JOB, None)
    assert everything.total_bytes == peak.total_bytes + model.model_size() + everything.nbytes
    found = []
    for nbytes in (0, everything.nbytes // 2, everything.nbytes):
        budget = everything.total_bytes - everything.nbytes + nbytes
        limited = with_budget(model, budget)
        limited.model_options["transformer_options"]["optimized_attention_override"] = FlashAttention()
        with LiveMemory("cpu") as memory, FusedNorms():
            sample(limited, torch.no_grad)  # In inference mode, operations that consist of others hide these.
        found.append(memory.peak.nbytes)
        assert bool(kept[-1]) == (nbytes > 0)
        assert found[-1] + model.model_size() + peak.context_bytes <= budget
        assert found[0] < found[-1] <= found[0] + nbytes or not nbytes
        assert memory.now.nbytes < row_bytes(512, 256), "nothing stays but the latent"


def test_no_rows_without_room_for_all_weights(model, t2v):
    everything = room_of(model)
    assert everything and not room_of(model, everything.total_bytes - everything.nbytes)
    assert not room_of(load_diffusion_model(t2v[1], dtype=torch.float32)), "exact products"
    compiled = model.clone()
    set_torch_compile_wrapper(compiled, backend="eager")
    assert not room_of(compiled), "torch would compile it anew in each sampling"
    few = SamplingJob((*SHAPE[:2], 3, *SHAPE[3:]))
    assert not row_room.row_room(model, few, Simulator.from_patcher(model).peak(few, None), AMPLE), "too few tokens"


def test_no_more_is_kept_than_the_device_has(model, kept, monkeypatch):
    everything = room_of(model)
    monkeypatch.setattr(row_room, "automatic_budget", lambda device: everything.total_bytes - everything.nbytes)
    sample(with_budget(model, AMPLE))
    assert kept == [None]


def test_other_models_make_room(model, kept, monkeypatch):
    """They leave until the rows and what a forward needs beside the weights are free."""
    asked = []
    monkeypatch.setattr(comfy.model_management, "free_memory", lambda nbytes, *_, **__: asked.append(nbytes) or [])
    sample(with_budget(model, AMPLE))
    peak = Simulator.from_patcher(model).peak(JOB, None)
    beside = peak.scratch_bytes + peak.activation_bytes + peak.fragmentation_bytes
    assert asked[-1] == room_of(model).nbytes + beside and kept[-1]


def test_rows_that_cannot_be_allocated_are_made_each_time(model, expected, kept, monkeypatch, caplog):
    class FullError(Exception):
        pass

    def fail(*_):
        raise FullError

    monkeypatch.setattr(comfy.model_management, "OOM_EXCEPTION", FullError)
    monkeypatch.setattr(row_room, "KeptRows", fail)
    assert torch.equal(sample(with_budget(model, AMPLE)), expected)
    assert kept == [None] and "int8 rows are not kept" in caplog.text


def test_nothing_is_kept_after_an_interruption(model, kept):
    class Interrupted(BaseException):
        pass

    def interrupt(execute, *args, **kwargs):
        execute(*args, **kwargs)
        assert kept[-1].used_bytes > 0
        raise Interrupted

    limited = with_budget(model, AMPLE)
    limited.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", interrupt)
    with pytest.raises(Interrupted):
        sample(limited)
    assert nothing_is_left(model, kept)


def test_another_strength_of_a_lora_is_another_sampling(model, kept):
    found = [sample(with_budget(with_lora(model, strength), AMPLE)) for strength in (0.5, 1.0)]
    assert not torch.equal(*found)
    assert torch.equal(found[1], without_keeping(with_lora(model, 1.0))), "the first strength is tested above"
    assert nothing_is_left(model, kept)


def test_the_log_says_how_much_is_kept(model, caplog):
    caplog.set_level(logging.INFO)
    sample(with_budget(model, AMPLE))
    assert caplog.text.count("GiB of int8 rows are kept from step to step") == 1
