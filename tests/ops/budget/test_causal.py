"""A causal Wan model in ComfyUI's AR video sampler: the keys and values that it keeps count."""

from __future__ import annotations

import json
import logging

import comfy.sample
import comfy.samplers
import comfy.sd
import pytest
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.ldm.wan import ar_model
from safetensors.torch import load_file

from wanquant.nodes.low_vram import WanQuantLowVRAM
from wanquant.ops.budget.live_memory import LiveMemory
from wanquant.ops.budget.sampling import expected_job, with_budget
from wanquant.ops.budget.sampling_job import SamplingJob
from wanquant.ops.budget.simulator import Simulator
from wanquant.quant import QuantError
from wanquant.tests.ops.budget.test_simulator import FlashAttention, FusedNorms

SHAPE = (1, 16, 9, 32, 32)
NOISE, TEXT = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 512, 4096)
TOKENS, WIDTH, LAYERS = 9 * 16 * 16, 256, 2
CACHES = 2 * LAYERS * TOKENS * WIDTH * 4
"""Bytes of the keys and values of all tokens in float32."""


@pytest.fixture(scope="module")
def model(t2v):
    metadata = {"config": json.dumps({"transformer": {"causal_ar": True}})}
    with torch.inference_mode():
        options = {"dtype": torch.float32}
        return comfy.sd.load_diffusion_model_state_dict(load_file(t2v[0]), options, metadata=metadata)


def sample(model, frames, sigmas=(1.0, 0.5, 0.0)):
    """Sample, by default two steps, `frames` latent frames at a time, or all at once for None."""
    sampler = comfy.samplers.ksampler("ar_video", {"num_frame_per_block": frames})
    if frames is None:
        sampler = comfy.samplers.ksampler("euler")
    text = [[TEXT, {}]]
    with torch.inference_mode(False), torch.no_grad():
        return comfy.sample.sample_custom(
            model, NOISE, 1.0, sampler, torch.tensor(sigmas), text, text, torch.zeros(SHAPE), disable_pbar=True, seed=0
        )


@pytest.mark.parametrize("frames", [1, 3])
def test_agrees_with_a_real_sampling(model, frames, monkeypatch):
    predicted = Simulator.from_patcher(model).peak(SamplingJob(SHAPE, frames_at_a_time=frames), None)
    # The causal blocks' own calls take no override; those of the other module are overridden as in the prediction.
    monkeypatch.setattr(ar_model, "optimized_attention", attention_pytorch)
    overridden = model.clone()
    overridden.model_options["transformer_options"]["optimized_attention_override"] = FlashAttention()
    with LiveMemory("cpu") as memory, FusedNorms():
        sample(overridden, frames)
    # Samplers differ in how many latents they keep.
    assert predicted.activation_bytes == pytest.approx(memory.peak.nbytes, rel=0.1)
    assert predicted.activation_bytes - CACHES < 0.9 * memory.peak.nbytes, "without what is kept it would be too low"


def test_the_sampler_decides_what_counts(model, caplog):
    expected = expected_job(model, 256, 256, 33)
    assert expected == SamplingJob(SHAPE, frames_at_a_time=1)
    simulator = Simulator.from_patcher(model)
    framewise, at_once = (simulator.peak(job, None).total_bytes for job in (expected, SamplingJob(SHAPE)))
    assert framewise < at_once
    caplog.set_level(logging.INFO)
    within, free = (sample(each, 1, sigmas=(1.0, 0.0)) for each in (with_budget(model, framewise), model))
    assert torch.equal(within, free)
    assert "ComfyUI's own forward" in caplog.text
    for budget, refused in ((framewise - 1, 1), (framewise, None)):
        with pytest.raises(QuantError, match=r"needs at least .* at most \d+ frames of this size keep"):
            sample(with_budget(model, budget), refused)


def test_the_node_says_that_it_runs_as_in_comfyui(model):
    text = WanQuantLowVRAM.execute(model, 0.5, 256, 256, 33).args[1]
    assert "needs at least" in text
    assert text.endswith("runs as in ComfyUI (all blocks, and what they keep), so a smaller budget cannot hold")
