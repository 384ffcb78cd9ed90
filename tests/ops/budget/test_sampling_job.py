"""Entries of conditionings other than text: jobs differ by their shapes, and the predicted peak includes them."""

from __future__ import annotations

from math import prod

import comfy.sd
import pytest
import torch
from safetensors.torch import load_file

from wanquant.ops.budget.live_memory import LiveMemory
from wanquant.ops.budget.sampling_job import ConditioningOutline, SamplingJob, clip_vision_entries
from wanquant.ops.budget.simulator import _SAMPLER_LATENTS, Simulator, run_forwards
from wanquant.ops.lean import MemoryPlan, apply_lean
from wanquant.tests.ops.budget.test_simulator import FlashAttention, FusedNorms
from wanquant.tests.ops.test_variants import METADATA, VARIANTS

FRAMES, SIDE = 3, 16
VIDEO, IMAGE = (1, 16, FRAMES, SIDE, SIDE), (1, 16, 1, SIDE, SIDE)
PIXELS = 8 * SIDE
CLIP = clip_vision_entries(257)
PROMPT = (1, 64, 4096)

# Entries that ComfyUI's nodes add to conditionings, by variant; a tuple is the shape of a tensor.
# Source: comfy_extras/nodes_wan.py and the extra_conds of comfy/model_base.py, ComfyUI 0.30.0.
ENTRIES = {
    "t2v": {"time_dim_concat": IMAGE},
    "5B": {"denoise_mask": (1, 1, FRAMES, SIDE, SIDE)},
    "i2v": {**CLIP, "concat_latent_image": VIDEO, "concat_mask": (1, 4, FRAMES, SIDE, SIDE)},
    "flf2v": {**clip_vision_entries(514), "concat_latent_image": VIDEO},
    "fun-control-ref": {**CLIP, "concat_latent_image": (1, 32, FRAMES, SIDE, SIDE), "reference_latents": [IMAGE]},
    "vace": {"vace_frames": [(1, 32, FRAMES, SIDE, SIDE)] * 2, "vace_mask": [(1, 64, FRAMES, SIDE, SIDE)] * 2},
    "camera": {**CLIP, "concat_latent_image": VIDEO, "camera_conditions": (1, 24, FRAMES, PIXELS, PIXELS)},
    "s2v": {"audio_embed": (1, 25, 1024, 4 * FRAMES), "reference_latents": [IMAGE], "control_video": VIDEO},
    "humo": {"audio_embed": (1, FRAMES, 8, 5, 1280), "reference_latents": [IMAGE]},
    "animate": {
        **CLIP,
        "concat_latent_image": VIDEO,
        "pose_video_latent": (1, 16, FRAMES - 1, SIDE, SIDE),
    },
    "animate2": {
        **CLIP,
        "concat_latent_image": VIDEO,
        "pose_video_latent": (1, 16, FRAMES - 1, SIDE, SIDE),
        "cross_attn_pose": PROMPT,
    },
    "scail": {**CLIP, "reference_latents": [IMAGE], "pose_video_latent": (1, 16, FRAMES, SIDE // 2, SIDE // 2)},
    "wandancer": {**CLIP, "concat_latent_image": VIDEO, "audio_embed": (1, 60, 35)},
}


def tensors(shapes):
    if isinstance(shapes, list):
        return [tensors(shape) for shape in shapes]
    return torch.randn(shapes) if isinstance(shapes, tuple) else shapes


@torch.no_grad()
def real(patcher, latent, entries, plan):
    """Return the peak in bytes of a real forward on the CPU, without the latent."""
    model = (apply_lean(patcher, plan) if plan else patcher).clone()
    options = {"wrappers": model.wrappers, "optimized_attention_override": FlashAttention()}
    loaded = patcher.patch_model(torch.device("cpu"))
    noise = torch.randn(latent)
    with LiveMemory("cpu") as memory, FusedNorms():
        run_forwards(loaded, noise, [entries], options)
    return memory.peak.nbytes


def simulated(patcher, latent, entries, plan):
    """Return the predicted peak in bytes, without the latents that the simulator adds for the sampler."""
    peak = Simulator.from_patcher(patcher).peak(SamplingJob(latent, (ConditioningOutline.from_entries(entries),)), plan)
    return peak.activation_bytes + peak.scratch_bytes - _SAMPLER_LATENTS * 4 * prod(latent)


@pytest.fixture
def load(variant_file):
    def load(name):
        """Return a small dense model and the shape of a latent for it."""
        if VARIANTS[name][0] is None:
            pytest.skip(f"this host has no {name}")
        state = load_file(variant_file(name))
        options = {"dtype": torch.bfloat16}
        patcher = comfy.sd.load_diffusion_model_state_dict(state, options, metadata=METADATA.get(name))
        assert type(patcher.model.model_config).__name__ == VARIANTS[name][2]
        return patcher, (1, patcher.model.latent_format.latent_channels, *VIDEO[2:])

    return load


@pytest.mark.parametrize("name", ENTRIES)
def test_prediction_equals_a_real_forward(name, load, monkeypatch):
    patcher, latent = load(name)
    prompt = {"cross_attn": torch.randn(PROMPT)}
    entries = prompt | {key: tensors(value) for key, value in ENTRIES[name].items()}
    whole = ConditioningOutline.entries
    for plan in (None, MemoryPlan(2, 64)):
        expected = real(patcher, latent, entries, plan)
        with monkeypatch.context() as patch:
            # The real forward has the tensors of the conditioning on its device.
            patch.setattr(ConditioningOutline, "entries", lambda outline: whole(outline, "meta"))
            assert simulated(patcher, latent, entries, plan) == pytest.approx(expected, rel=1e-3)
        assert simulated(patcher, latent, prompt, plan) < expected


def test_faces_are_counted(load):
    """The simulator runs the motion encoder for faces of 512 x 512 pixels without computing anything."""
    patcher, latent = load("animate")
    entries = {key: tensors(value) for key, value in ENTRIES["animate"].items()}
    face = {"face_video_pixels": torch.empty(()).expand(1, 3, 77, 512, 512)}
    least = 2 * 77 * 3 * 512**2
    assert simulated(patcher, latent, entries | face, None) > simulated(patcher, latent, entries, None) + least


def test_jobs_differ_only_by_shapes():
    def job(fill, size=4, **others):
        return SamplingJob(VIDEO).with_entries(a=[torch.full((size,), fill)], b={"c": 1.0, "image": CLIP}, **others)

    assert job(1.0) == job(2.0)
    assert hash(job(1.0)) == hash(job(2.0))
    assert job(1.0, control=object()) == job(1.0)
    assert len({job(1.0), job(1.0, 5), job(1.0, d="e"), SamplingJob(VIDEO)}) == 4
    there = ConditioningOutline.from_entries({"a": torch.empty(3, device="meta")}).entries()["a"]
    assert (there.device.type, there.untyped_storage().nbytes()) == ("meta", 12)
    (entry,) = job(1.0).conditionings[0].entries()["a"]
    assert (entry.shape, entry.dtype, entry.untyped_storage().nbytes()) == ((4,), torch.float32, 4)


def test_entries_of_other_nodes_may_have_any_keys():
    entries = ConditioningOutline.from_entries({"regions": {0: 1.0, (1, 2): torch.ones(3)}}).entries()
    assert entries["regions"][0] == 1.0
    assert entries["regions"][1, 2].shape == (3,)
