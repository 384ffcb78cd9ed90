"""Two experts share the memory of one, through ComfyUI's own sampling."""

from __future__ import annotations

import gc
import weakref

import comfy.model_management
import comfy.sample
import psutil
import pytest
import torch
from comfy.patcher_extension import WrappersMP

from wanquant.ops.budget.experts import share_memory, simulator_for
from wanquant.ops.budget.sampling import with_budget
from wanquant.ops.budget.sampling_job import SamplingJob
from wanquant.ops.budget.simulator import Simulator
from wanquant.ops.loading.diffusion_model import load_diffusion_model
from wanquant.quant.conversion.convert import convert
from wanquant.tests.ops.packed.patching import lora, with_lora


@pytest.fixture(scope="module")
def files(tiny_wan, tmp_path_factory):
    """Return two Q8_0 files of 34 MB, which is large compared with other growth of the process."""
    folder = tmp_path_factory.mktemp("experts")
    paths = []
    for seed in (1, 2):
        source = tiny_wan["write_tiny_wan"](folder / f"{seed}.safetensors", dim=640, ffn_dim=2560, layers=3, seed=seed)
        paths.append(convert(source, folder / f"{seed}.gguf", "Q8_0", effort="fast").path)
    return paths


@pytest.fixture
def experts(files):
    pair = [load_diffusion_model(path, dtype=torch.float32) for path in files]
    share_memory(*pair)
    yield pair
    comfy.model_management.unload_all_models()


def sample(patcher, latent):
    """Sample one step as KSampler does."""
    text = [[torch.ones(1, 7, 4096) / 64, {}]]
    return comfy.sample.sample(
        patcher,
        torch.zeros_like(latent),
        1,
        1.0,
        "euler",
        "simple",
        text,
        text,
        latent,
        disable_noise=True,
        disable_pbar=True,
    )


LATENT = torch.ones(1, 16, 1, 4, 4)


def loaded():
    return [patcher.model for patcher in comfy.model_management.loaded_models()]


def test_one_is_loaded_at_a_time_and_results_do_not_change(experts, files):
    alone = [sample(load_diffusion_model(path, dtype=torch.float32), LATENT) for path in files]
    comfy.model_management.unload_all_models()
    for _ in range(2):
        for expert, expected in zip(experts, alone, strict=True):
            assert torch.equal(sample(expert, LATENT), expected)
            assert loaded() == [expert.model]


def test_clones_of_the_experts_share_too(experts, t2v):
    high = with_lora(experts[0], lora(experts[0].model.diffusion_model.state_dict()))
    expected = sample(high, LATENT)
    sample(experts[1].clone(), LATENT)
    assert loaded() == [experts[1].model]
    assert torch.equal(sample(high, LATENT), expected)
    assert loaded() == [high.model]


def test_other_models_stay(experts, t2v):
    other = load_diffusion_model(t2v[1])
    comfy.model_management.load_models_gpu([other])
    for expert in experts:
        sample(expert, LATENT)
    assert set(loaded()) == {other.model, experts[1].model}


def test_alternating_does_not_grow_memory(experts):
    process, resident = psutil.Process(), []
    for _ in range(10):
        for expert in experts:
            sample(expert, LATENT)
        gc.collect()
        resident.append(process.memory_info().rss)
    assert resident[-1] < 1.02 * resident[1]


def test_both_get_the_plan_of_the_larger(t2v, tiny_wan, tmp_path, caplog):
    job = SamplingJob((1, 16, 5, 32, 32))
    larger = tiny_wan["write_tiny_wan"](tmp_path / "larger.safetensors", ffn_dim=4096, layers=1)
    files = t2v[1], convert(larger, tmp_path / "larger.gguf", "Q8_0", effort="fast").path
    small, large = pair = [load_diffusion_model(file, dtype=torch.float32) for file in files]
    alone, expected = (Simulator.from_patcher(patcher).peak(job, None).total_bytes for patcher in pair)
    share_memory(*pair)
    with_a_lora = with_lora(small, lora(small.model.diffusion_model.state_dict()))
    for patcher in (with_a_lora, large):
        assert simulator_for(patcher).peak(job, None).total_bytes == expected > alone
    caplog.set_level("INFO")
    for patcher in (small.clone(), large):
        limited = with_budget(patcher, expected)
        (prepare,) = limited.get_wrappers(WrappersMP.PREPARE_SAMPLING, "wanquant.budget")
        prepare(lambda *_, **__: None, limited, torch.Size(job.latent), {"positive": [{}]})
    first, second = [record.getMessage() for record in caplog.records if "predicted" in record.getMessage()]
    assert first == second
    del large, pair, patcher, limited, prepare
    assert simulator_for(small).peak(job, None).total_bytes == alone


def test_models_are_freed_without_the_garbage_collector(files):
    pair = [load_diffusion_model(path) for path in files]
    share_memory(*pair)
    models = [weakref.ref(patcher.model) for patcher in pair]
    gc.disable()
    try:
        pair.clear()
        assert [model() for model in models] == [None, None]
    finally:
        gc.enable()
