"""What ComfyUI's AR video sampler keeps while a causal Wan model makes a video a few frames at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.ldm.wan.model as wan
import torch
from comfy.model_base import BaseModel

from .sampling_job import SamplingJob

_SAMPLER = "sample_ar_video"


def is_causal(model: wan.WanModel) -> bool:
    """Return whether the AR video sampler can sample the model."""
    return hasattr(model, "init_kv_caches")


def frames_at_a_time(sampler: object) -> int | None:
    """Return the latent frames that one of ComfyUI's samplers makes at a time; None if it makes all at once."""
    if getattr(getattr(sampler, "sampler_function", None), "__name__", "") != _SAMPLER:
        return None
    options: Mapping[str, Any] = getattr(sampler, "extra_options", {})
    return int(options.get("num_frame_per_block", 1))


def last_block(model: BaseModel, job: SamplingJob, frames: int, device: torch.device) -> dict[str, Any]:
    """Return the transformer options of the last frames of a video, with what was kept of all frames before.

    Args:
        frames: latent frames that are made at a time.
        device: for the keys and values of all tokens of all blocks, which this allocates.

    Source: comfy/k_diffusion/sampling.py sample_ar_video, ComfyUI 0.30.0.
    """
    transformer, (batch, _, total, height, width) = model.diffusion_model, job.latent
    tokens_per_frame = -(-height // 2) * -(-width // 2)
    caches = transformer.init_kv_caches(batch, total * tokens_per_frame, device, model.get_dtype())
    for cache in caches:
        cache["end"] = (total - frames) * tokens_per_frame
    texts = transformer.init_crossattn_caches(batch, device, model.get_dtype())
    return {"ar_state": {"start_frame": total - frames, "kv_caches": caches, "crossattn_caches": texts}}
