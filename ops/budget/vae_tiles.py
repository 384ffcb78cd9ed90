"""The tile size for VAE Decode (Tiled), from the peak of decoding one tile on meta tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
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
from .sampling_job import SamplingJob
from .simulator import Peak, streamed_bytes

# Source: comfy/sd.py VAE.__init__, ComfyUI 0.30.0.
_SAME = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [], "temperal_downsample": [False, True, True]}
_DTYPES = [torch.bfloat16, torch.float16, torch.float32]
_STEP = 64
"""Pixels between two tile sizes. A quarter of each size, the overlap, is then a multiple of a latent cell."""


HOST_TILES = (256, 64)
"""Tile size and overlap in pixels that ComfyUI chooses by itself. Source: comfy/sd.py VAE.decode, ComfyUI 0.30.0."""


@dataclass(frozen=True)
class Tiles:
    """Settings for VAE Decode (Tiled). Tiles cut frames only in space: in time the VAE decodes few at once."""

    size: int
    """Side in pixels."""
    peak: Peak
    streamed: bool
    """ComfyUI streams the VAE's weights layer by layer, as it does when they exceed the free memory."""

    @property
    def overlap(self) -> int:
        """The overlap in pixels that ComfyUI uses by default for this size."""
        return self.size // 4

    def __str__(self) -> str:
        how = ", its weights streamed" if self.streamed else ""
        size = f"decoded in tiles of {self.size} pixels, overlap {self.overlap}"
        return f"{size}: {self.peak.total_bytes / GIB:.2f} GiB{how}"


def decoding_peak(job: SamplingJob, size: int, dtype: torch.dtype, *, streamed: bool = False) -> Peak:
    """Return the peak of decoding one tile of all frames.

    Args:
        size: side of the tile in pixels. A smaller video is one tile.
        dtype: that the VAE computes in.
        streamed: the VAE's weights are streamed, and not all on the device.
    """
    _, channels, frames, *cells = job.latent
    vae, tile = _meta_vae(channels, dtype), [min(count, size // pixels_per_cell(channels)) for count in cells]
    weight_bytes = streamed_bytes(vae) if streamed else sum(parameter.nbytes for parameter in vae.parameters())
    return replace(_peak_without_weights((1, channels, frames, *tile), dtype), weight_bytes=weight_bytes)


@lru_cache
def _peak_without_weights(shape: tuple[int, ...], dtype: torch.dtype) -> Peak:
    """Return the peak of decoding a latent of this shape, (1, channels, frames, height, width), at once."""
    memory = LiveMemory(META)
    with torch.inference_mode(False), torch.no_grad(), memory:
        latent = torch.empty(shape, device=META)
        _meta_vae(shape[1], dtype).decode(latent.to(dtype)).float()
    return Peak.of(memory, weight_bytes=0)


def tiles_within(job: SamplingJob, budget: int, dtype: torch.dtype | None = None) -> Tiles:
    """Return the largest tiles, up to the size of the video, whose peak is at most `budget` bytes.

    If all tiles exceed the budget, return the smallest. Weights are streamed only if even the smallest tile exceeds the
    budget together with all of them.

    Source: comfy/sd.py VAE.decode_tiled, which loads as many weights as there is room for, ComfyUI 0.30.0.

    Args:
        dtype: that the VAE computes in, by default ComfyUI's choice for its device.
    """
    dtype = dtype or comfy.model_management.vae_dtype(comfy.model_management.vae_device(), _DTYPES)
    sides = [pixels_per_cell(job.latent[1]) * cells for cells in job.latent[3:]]
    streamed = decoding_peak(job, _STEP, dtype).total_bytes > budget
    smallest = decoding_peak(job, _STEP, dtype, streamed=streamed)

    def can_be_within(size: int) -> bool:
        # The activations of convolutions grow with the area.
        growth = math.prod(min(side, size) / min(side, _STEP) for side in sides)
        return smallest.total_bytes + (growth - 1) * smallest.activation_bytes <= budget

    largest = -(-max(sides) // _STEP) * _STEP
    sizes = (size for size in range(largest, _STEP, -_STEP) if can_be_within(size))
    peaks = ((size, decoding_peak(job, size, dtype, streamed=streamed)) for size in sizes)
    size, peak = next(((size, peak) for size, peak in peaks if peak.total_bytes <= budget), (_STEP, smallest))
    return Tiles(size, peak, streamed)


@lru_cache(maxsize=2)
def _meta_vae(channels: int, dtype: torch.dtype) -> comfy.ldm.wan.vae.WanVAE:
    """Return Wan 2.2's VAE for 48 channels, else Wan 2.1's, on meta tensors."""
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
    """Allocate what flash attention allocates: the output, not the scores."""
    return torch.empty_like(q)
