"""The published Wan models that advice and predictions are given for, on tensors without data."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter import LoRAAdapter

from ...quant.plan.recipe import find_recipe
from ...quant.plan.wan_files import tensor_specs
from ...quant.plan.wan_shapes import SIZES, VACE_14B, WanSize
from ..packed.linear import packed_modules
from ..packed.precision import EXACT, OPERATIONS
from .meta_wan import META, meta_model
from .sampling_job import SamplingJob, clip_vision_entries
from .simulator import Simulator

Video = tuple[int, int, int]
"""(width and height in pixels, frames)."""

SMALL, LARGE = (832, 480, 81), (1280, 720, 81)
RANK = 64
"""Rank of LoRAs, that of most published ones."""
_CLIP_VISION_TOKENS = 257
_VACE_VIDEOS = 2


class PublishedModel(NamedTuple):
    """A model as its authors published it."""

    name: str
    size: WanSize
    videos: tuple[Video, ...] = (SMALL, LARGE)
    files: int = 1
    """2 for the experts of a Wan 2.2 A14B model."""


# The image-to-video experts of Wan 2.2 take the picture with the latent, without CLIP vision.
_I2V_EXPERT = SIZES["14B"]._replace(in_dim=36)
PUBLISHED = (
    PublishedModel("Wan 2.1 T2V 1.3B", SIZES["1.3B"]),
    PublishedModel("Wan 2.2 TI2V 5B", SIZES["5B"], (SMALL, (1280, 704, 121))),
    PublishedModel("Wan 2.1 T2V 14B", SIZES["14B"]),
    PublishedModel("Wan 2.1 I2V 14B", SIZES["I2V-14B"]),
    PublishedModel("Wan 2.1 VACE 14B", VACE_14B),
    PublishedModel("Wan 2.2 T2V A14B", SIZES["14B"], files=2),
    PublishedModel("Wan 2.2 I2V A14B", _I2V_EXPERT, files=2),
)


def sampling(size: WanSize, video: Video) -> SamplingJob:
    """Return the sampling of a video: with one picture for image-to-video of Wan 2.1, with two videos for VACE."""
    plain = SamplingJob.for_video(*video, channels=size.out_dim)
    if size.image:
        return plain.with_entries(**clip_vision_entries(_CLIP_VISION_TOKENS))
    return plain.with_control_videos(_VACE_VIDEOS) if size.vace_layers else plain


@lru_cache(maxsize=2 * len(PUBLISHED))
def simulator(size: WanSize, recipe: str, loras: int = 0, precision: str = EXACT) -> Simulator:
    """Return the simulator of the MODEL that `patcher` returns for the same arguments."""
    return Simulator.from_patcher(patcher(size, recipe, loras, precision))


def patcher(size: WanSize, recipe: str, loras: int = 0, precision: str = EXACT) -> ModelPatcher:
    """Return the MODEL of a GGUF in a recipe, without data, with `loras` LoRAs on every quantized layer."""
    specs = tensor_specs(size, find_recipe(recipe))
    model = meta_model(
        {spec.name: spec.shape for spec in specs},
        {spec.name: spec.qtype for spec in specs},
        operations=OPERATIONS[precision],
    )
    made = ModelPatcher(model, META, META)
    for _ in range(loras):
        layers = packed_modules(made.model)
        made.add_patches({key: _lora(*layer.weight.shape) for key, layer in layers})
    return made


def _lora(rows: int, columns: int) -> LoRAAdapter:
    shapes = (rows, RANK), (RANK, columns)
    up, down = (torch.empty(*shape, dtype=torch.bfloat16, device=META) for shape in shapes)
    return LoRAAdapter(set(), (up, down, None, None, None, None))
