"""Peak memory of the host's VAE decoding a video in tiles, found on meta tensors, and the tiles for a budget."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import comfy.ldm.wan.vae
import comfy.ldm.wan.vae2_2
import comfy.model_management
import torch
from torch import Tensor

from ...quant.plan.wan_shapes import pixels_per_cell
from ...quant.units import GIB
from .live_memory import LiveMemory
from .meta_wan import META
from .sampling_job import Job
from .simulator import Peak, streamed_bytes

# Source: comfy/sd.py VAE.__init__, ComfyUI 0.30.0.
_SAME = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [], "temperal_downsample": [False, True, True]}
_DTYPES = [torch.bfloat16, torch.float16, torch.float32]
_STEP = 64
"""Pixels between one tile size and the next; a fourth of each is a multiple of the latent's cells."""


HOST_TILES = (256, 64)
"""Size and overlap in pixels, where the host decodes in tiles by itself. Source: comfy/sd.py VAE.decode."""


@dataclass(frozen=True)
class Tiles:
    """Of the host's VAEDecodeTiled; in time a video is decoded whole, which takes little."""

    size: int
    """Pixels of a side."""
    peak: Peak
    streamed: bool
    """The host moves weights to the accelerator layer by layer, as it does by itself where they do not fit."""

    @property
    def overlap(self) -> int:
        """Pixels, the part that the host takes by itself."""
        return self.size // 4

    def __str__(self) -> str:
        how = ", its weights streamed" if self.streamed else ""
        return f"decoded in tiles of {self.size} pixels, overlap {self.overlap}: {self.peak.total / GIB:.2f} GiB{how}"


@lru_cache
def decoding_peak(job: Job, size: int, dtype: torch.dtype, *, streamed: bool = False) -> Peak:
    """Of one tile with `size` pixels to a side at most, of all frames of the video; the VAE is resident or streamed."""
    _, channels, frames, *cells = job.latent
    vae, tile = _vae(channels, dtype), [min(count, size // pixels_per_cell(channels)) for count in cells]
    memory = LiveMemory(META)
    with torch.inference_mode(False), torch.no_grad(), memory:
        latent = torch.empty(1, channels, frames, *tile, device=META)
        vae.decode(latent.to(dtype)).float()
    weights = streamed_bytes(vae) if streamed else sum(parameter.nbytes for parameter in vae.parameters())
    return Peak(weights, memory.peak.scratch, memory.peak.activations, memory.now.flops)


def tiles_within(job: Job, budget: int, dtype: torch.dtype | None = None) -> Tiles:
    """The largest that keep within `budget` bytes, or else the smallest; no larger than the video.

    Weights are streamed only where no tile fits beside all of them.
    Source: comfy/sd.py VAE.decode_tiled, which loads as much as there is room for, ComfyUI 0.30.0.

    Args:
        dtype: that the VAE computes in, by default what the host takes on its device.
    """
    dtype = dtype or comfy.model_management.vae_dtype(comfy.model_management.vae_device(), _DTYPES)
    sides = [pixels_per_cell(job.latent[1]) * cells for cells in job.latent[3:]]
    streamed = decoding_peak(job, _STEP, dtype).total > budget
    least = decoding_peak(job, _STEP, dtype, streamed=streamed)

    def fits(size: int) -> bool:
        # Convolutions take as much for every cell.
        share = math.prod(min(side, size) / min(side, _STEP) for side in sides)
        return least.total + (share - 1) * least.activations <= budget

    sizes = range(_STEP, max(sides) + _STEP, _STEP)
    size = next((size for size in reversed(sizes) if fits(size)), _STEP)
    return Tiles(size, decoding_peak(job, size, dtype, streamed=streamed), streamed)


@lru_cache(maxsize=2)
def _vae(channels: int, dtype: torch.dtype) -> comfy.ldm.wan.vae.WanVAE:
    """Wan 2.2's for 48 channels, else Wan 2.1's."""
    with META:
        if channels == 48:
            vae = comfy.ldm.wan.vae2_2.WanVAE(dim=160, z_dim=channels, **_SAME)
        else:
            vae = comfy.ldm.wan.vae.WanVAE(dim=96, z_dim=channels, **_SAME)
    for module in vae.modules():
        if isinstance(module, comfy.ldm.wan.vae.AttentionBlock):
            module.optimized_attention = _flash_attention
    return vae.to(dtype).requires_grad_(False)


def _flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Allocates what attention without a matrix of scores does."""
    return torch.empty_like(q)
