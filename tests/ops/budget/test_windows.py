"""Context windows: what a forward of a window needs is predicted, not what the whole video would need."""

from __future__ import annotations

import logging

import comfy.context_windows
import comfy.sample
import pytest
import torch
from comfy.patcher_extension import WrappersMP

from wanquant.nodes.low_vram import WanQuantLowVRAM
from wanquant.ops.budget.sampling import job_of_latent, with_budget
from wanquant.ops.budget.sampling_job import SamplingJob
from wanquant.ops.budget.simulator import Simulator
from wanquant.ops.loading.diffusion_model import load_diffusion_model
from wanquant.quant.conversion.convert import convert
from wanquant.quant.units import GIB

SHAPE, LENGTH = (1, 16, 6, 16, 16), 3
PICTURE = {"concat_latent_image": torch.zeros(SHAPE), "concat_mask": torch.ones(1, 1, *SHAPE[2:])}


@pytest.fixture(scope="module")
def model(variant_file, tmp_path_factory):
    """Return an image-to-video model with windows over the frames, as Wan Context Windows sets them."""
    path = tmp_path_factory.mktemp("windows") / "i2v.gguf"
    with torch.inference_mode():
        patcher = load_diffusion_model(convert(variant_file("t2v-14B-i2v"), path, "Q8_0", effort="fast").path)
    patcher.model_options["context_handler"] = comfy.context_windows.IndexListContextHandler(
        comfy.context_windows.get_matching_context_schedule("standard_static"),
        comfy.context_windows.get_matching_fuse_method("pyramid"),
        context_length=LENGTH,
        context_overlap=1,
        dim=2,
    )
    comfy.context_windows.create_prepare_sampling_wrapper(patcher)
    return patcher


def sample(model):
    prompts = [[[torch.zeros(1, 16, 4096), PICTURE]] for _ in range(2)]
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, 1, 4.0, "euler", "simple", *prompts, torch.zeros(SHAPE), disable_pbar=True, seed=0
        )


def test_a_window_is_planned_for(model, caplog):
    caplog.set_level(logging.INFO)
    limited, frames = with_budget(model, 100 * GIB), []

    def note(executor, x, *args, **kwargs):
        frames.append(x.shape[2])
        return executor(x, *args, **kwargs)

    limited.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", note)
    expected = sample(model)
    assert (sample(limited) - expected).norm() <= 1e-5 * expected.norm()
    job = job_of_latent(model, {"samples": torch.zeros(SHAPE)})
    assert max(frames) == job.frames_at_a_time == LENGTH + 1, "ComfyUI adds a frame from before the window"
    assert "128x128, 21 frames, 13 at a time in " in caplog.text
    assert "decoded" in WanQuantLowVRAM.execute(model, 3.5, 128, 128, 21).args[1]


def test_the_peak_is_that_of_a_window(model):
    simulator, batch = Simulator.from_patcher(model), SHAPE[:2]
    job = job_of_latent(model, {"samples": torch.zeros(SHAPE)}).with_entries(**PICTURE)
    window, whole = simulator.peak(job, None), simulator.peak(SamplingJob(SHAPE).with_entries(**PICTURE), None)
    short = simulator.peak(SamplingJob((*batch, LENGTH + 1, *SHAPE[3:])), None)
    assert short.flops == window.flops < whole.flops
    assert short.activation_bytes < window.activation_bytes < whole.activation_bytes
