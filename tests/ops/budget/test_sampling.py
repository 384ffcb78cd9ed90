"""A MODEL with a budget is sampled with the same result; weights and other models leave the accelerator."""

from __future__ import annotations

import logging

import comfy.model_management
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper

from wanquant.ops.budget.automatic import AUTOMATIC
from wanquant.ops.budget.choose_plan import memory_plans
from wanquant.ops.budget.sampling import (
    _on_weights_device,
    _time_projection_in_main_memory,
    expected_job,
    with_budget,
)
from wanquant.ops.budget.sampling_job import SamplingJob
from wanquant.ops.budget.simulator import Simulator
from wanquant.ops.budget.step_time import measured_step, step_key
from wanquant.ops.loading.diffusion_model import load_diffusion_model
from wanquant.ops.loading.prefetch import prefetch_blocks
from wanquant.ops.packed.linear import packed_modules
from wanquant.quant import QuantError
from wanquant.quant.units import GIB

SHAPE, PROMPT = (1, 16, 5, 32, 32), (1, 16, 4096)
CONDS = {"positive": [{"cross_attn": torch.empty(PROMPT)}]}
JOB = SamplingJob(SHAPE).with_entries(cross_attn=torch.empty(PROMPT))
AMPLE = 100 * GIB


@pytest.fixture(scope="module")
def model(t2v):
    """Return a model that was loaded in inference mode, as in ComfyUI's nodes."""
    with torch.inference_mode():
        return load_diffusion_model(t2v[1], dtype=torch.float32)


def smallest_budget(model):
    simulator = Simulator.from_patcher(model)
    return simulator.peak(JOB, memory_plans(simulator.heads)[-1]).total_bytes


def sample(model, mode=torch.inference_mode, positives=1, prompt=PROMPT):
    """Sample two steps with some combined positive prompts and a negative one."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(SHAPE, generator=generator)
    prompts = [[[torch.randn(prompt, generator=generator), {}] for _ in range(count)] for count in (positives, 1)]
    with mode():
        return comfy.sample.sample(
            model, noise, 2, 4.0, "euler", "simple", *prompts, torch.zeros(SHAPE), disable_pbar=True, seed=0
        )


def test_same_result_within_the_budget(model, caplog):
    expected = sample(model)
    caplog.set_level(logging.INFO)
    for budget, how in ((smallest_budget(model), "of heads"), (AMPLE, "own forward")):
        caplog.clear()
        got = sample(with_budget(model, budget))
        assert (got - expected).norm() <= 1e-5 * expected.norm()
        (message,) = [record.getMessage() for record in caplog.records if "predicted peak" in record.getMessage()]
        assert "256x256, 17 frames" in message
        assert how in message


def test_weights_stay_mapped_when_they_are_unloaded(model):
    """ComfyUI unloads on request outside of the inference mode in which nodes run."""
    expected = sample(model)
    mapped = [layer.weight._qdata.data_ptr() for _, layer in packed_modules(model.model)]
    comfy.model_management.unload_all_models()
    assert [layer.weight._qdata.data_ptr() for _, layer in packed_modules(model.model)] == mapped
    assert torch.equal(sample(model), expected)


def test_prompts_run_separately_with_their_own_index(model):
    """Combined prompts too, for which the prediction does not count a batch."""
    expected, seen = sample(model, positives=2), []

    def note(executor, x, timestep, context, clip_fea, time_dim_concat, transformer_options, **kwargs):
        seen.append((len(x), *transformer_options["cond_or_uncond"]))
        return executor(x, timestep, context, clip_fea, time_dim_concat, transformer_options, **kwargs)

    for budget in (smallest_budget(model), AMPLE):
        limited = with_budget(model, budget)
        limited.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", note)
        seen.clear()
        got = sample(limited, positives=2)
        assert sorted(seen) == [(1, 0)] * 4 + [(1, 1)] * 2
        assert (got - expected).norm() <= 1e-5 * expected.norm()
    assert "memory_required" not in vars(model.model)


def test_refuses_at_sampling(model):
    with pytest.raises(QuantError, match="256x256, 17 frames needs at least"):
        sample(with_budget(model, GIB // 8))


def test_refuses_the_prompt_of_another_text_encoder(model):
    with pytest.raises(QuantError, match=r"prompt of shape \(1, 77, 768\): expected \(batch, tokens, 4096\) for this"):
        sample(with_budget(model, AMPLE), prompt=(1, 77, 768))


def test_counts_the_conditionings(model):
    positive, latents = CONDS["positive"][0], {"time_dim_concat": torch.empty(SHAPE)}
    limited = with_budget(model, smallest_budget(model))
    (prepare,) = limited.get_wrappers(WrappersMP.PREPARE_SAMPLING, "wanquant.budget")
    prepare(lambda *_, **__: None, model, torch.Size(SHAPE), {"positive": [positive]})
    with pytest.raises(QuantError, match="needs at least"):
        prepare(lambda *_, **__: None, model, torch.Size(SHAPE), {"positive": [positive | latents]})


def test_counts_the_attention_of_a_clone(model):
    """A node after Wan Low VRAM may replace it."""
    limited = with_budget(model, AMPLE)
    (prepare,) = limited.get_wrappers(WrappersMP.PREPARE_SAMPLING, "wanquant.budget")
    other = limited.clone()
    other.model_options["transformer_options"]["optimized_attention_override"] = object()
    for each, accepts_chunks in ((limited, True), (other, False)):
        prepare(lambda *_, **__: None, each, torch.Size(SHAPE), CONDS)
        assert prepare.__self__._simulator._attention.accepts_query_chunks is accepts_chunks


def test_warns_that_a_compiled_model_runs_stock(model, caplog):
    compiled = model.clone()
    set_torch_compile_wrapper(compiled, "eager")
    for start, budget, warnings in (
        (model, smallest_budget(model), 0),
        (compiled, AMPLE, 0),
        (compiled, smallest_budget(model), 1),
    ):
        caplog.clear()
        (prepare,) = with_budget(start, budget).get_wrappers(WrappersMP.PREPARE_SAMPLING, "wanquant.budget")
        prepare(lambda *_, **__: None, start, torch.Size(SHAPE), CONDS)
        assert sum("compiled model" in record.getMessage() for record in caplog.records) == warnings


def test_a_second_budget_replaces_the_first(model):
    before = {kind: dict(wrappers) for kind, wrappers in model.wrappers.items()}
    first = with_budget(model, 5)
    second = with_budget(first, AMPLE)
    for kinds in second.wrappers.values():
        assert all(len(wrappers) == 1 for wrappers in kinds.values())
        assert [prefetch_blocks] not in kinds.values()
    assert model.wrappers == before


class Accelerated:
    """A patcher that claims to be on a GPU and records what it is told to load."""

    def __init__(self, model, dynamic):
        self._model, self._dynamic, self.loaded = model, dynamic, []
        self.load_device = torch.device("cuda", 0)

    def __getattr__(self, name):
        return getattr(self._model, name)

    def is_dynamic(self):
        return self._dynamic

    def partially_load(self, device, room):
        self.loaded.append((device, room))


@pytest.mark.parametrize("dynamic", [False, True])
def test_weights_get_the_rest_of_the_budget(model, monkeypatch, dynamic):
    class Pages:
        def set_watermark_limit(self, nbytes):
            patcher.loaded.append((patcher.load_device, nbytes))

    patcher, freed, asked = Accelerated(model, dynamic), [], []
    monkeypatch.setattr(model.model, "dynamic_vbars", {patcher.load_device: Pages()}, raising=False)
    monkeypatch.setattr(comfy.model_management, "free_memory", lambda *args, **kwargs: freed.append(args))
    budget = smallest_budget(model) + 1000
    (prepare,) = with_budget(model, budget).get_wrappers(WrappersMP.PREPARE_SAMPLING, "wanquant.budget")
    prepare(
        lambda *_, **kwargs: asked.append(kwargs),
        patcher,
        torch.Size(SHAPE),
        CONDS,
    )
    assert asked == [{"force_full_load": False, "force_offload": True}]
    assert [device for _, device in freed] == [patcher.load_device]
    assert patcher.loaded == [(patcher.load_device, 1000)]


def test_expected_job_has_the_latent_of_the_model(model):
    assert expected_job(model, 832, 480, 81) == SamplingJob((1, 16, 21, 60, 104))


def test_warns_that_a_pose_cache_is_not_counted(model, caplog):
    caplog.set_level(logging.WARNING)
    cached = with_budget(model, AMPLE)
    cached.model_options["transformer_options"]["animate2_cache"] = object()
    sample(cached)
    assert "Wan Animate 2 Cache keeps on the GPU" in caplog.text


def test_time_projection_accepts_further_arguments_of_newer_hosts():
    seen = []

    class Layer(torch.nn.Linear):
        def forward(self, x, *args, **kwargs):
            seen.append((args, kwargs))
            return super().forward(x)

    layer, x, residual = Layer(4, 4), torch.ones(1, 4), torch.ones(4)
    assert torch.equal(_on_weights_device(layer, x, "gelu_tanh", residual=residual), layer(x))
    assert seen == [(("gelu_tanh",), {"residual": residual}), ((), {})]


def test_a_forward_of_another_node_stays_in_the_time_projection(model, monkeypatch):
    """A LoRA in bypass mode has one."""
    layer, x = model.model.diffusion_model.time_projection[-1], torch.randn(1, 256)
    expected, own = 2 * layer(x), layer.forward
    monkeypatch.setattr(layer, "forward", lambda x: 2 * own(x))
    with _time_projection_in_main_memory(model.model.diffusion_model, unless=False):
        assert torch.equal(layer(x), expected)


def test_an_automatic_budget_is_chosen_when_sampling_starts(model, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    limited, free = with_budget(model, AUTOMATIC), []
    monkeypatch.setattr("wanquant.ops.budget.sampling.automatic_budget", lambda device: free[-1])
    for gib, how in ((100, "own forward"), (smallest_budget(model) / GIB, "of heads")):
        caplog.clear()
        free.append(round(gib * GIB))
        sample(limited)
        assert how in caplog.text and f"in {gib:.2f} GiB" in caplog.text


def test_a_step_is_timed_once_it_was_sampled(model):
    key = step_key(model, SHAPE, None)
    sample(with_budget(model, AMPLE))
    assert measured_step(key).startswith("; a step took ")
    assert measured_step(step_key(model, (1, 16, 9, 32, 32), None)) == ""


def test_a_step_is_timed_without_what_was_interrupted(model, monkeypatch):
    """Another node may evaluate the model again in each step, as skip layer guidance does."""

    def evaluate_again(args):
        comfy.samplers.calc_cond_batch(
            args["model"], [args["cond"]], args["input"], args["sigma"], args["model_options"]
        )
        return args["denoised"]

    def interrupt(*_):
        raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr("wanquant.ops.budget.step_time.time.perf_counter", iter([0, 100, 102]).__next__)
    limited = with_budget(model, AMPLE)
    limited.set_model_sampler_post_cfg_function(interrupt)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(limited)
    limited.model_options["sampler_post_cfg_function"] = [evaluate_again]
    sample(limited)
    assert measured_step(step_key(model, SHAPE, None)) == "; a step took 2 s here"


def test_says_that_another_latent_came_before(model, caplog):
    for expected, warnings in ((SHAPE, 0), ((1, 16, 3, 32, 32), 1)):
        caplog.clear()
        sample(with_budget(model, AMPLE, expected))
        assert caplog.text.count("is sampled; the memory plan is for the latter") == warnings


def test_says_that_the_result_is_not_a_number(model, caplog):
    limited = with_budget(model, AMPLE)
    limited.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", lambda execute, x, *args, **_: x * float("nan"))
    sample(limited)
    assert "not a number (NaN); choose precision exact" in caplog.text
