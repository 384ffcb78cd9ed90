"""The published Wan models that advice and predictions are given for, on tensors without data."""

from __future__ import annotations

from typing import NamedTuple

import torch
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter import LoRAAdapter

from ...quant.gguf.layout import TensorSpec
from ...quant.plan.recipe import Recipe, plan_types
from ...quant.plan.wan_shapes import SIZES, VACE_14B, WanSize, transformer_shapes
from ..packed.linear import packed_modules
from .meta_wan import META, meta_model
from .sampling_job import SamplingJob, clip_vision_entries
from .simulator import Simulator

Video = tuple[int, int, int]
"""(width and height in pixels, frames)."""

SMALL, LARGE = (832, 480, 81), (1280, 720, 81)
_CLIP_VISION_TOKENS = 257
_VACE_VIDEOS = 2


class PublishedModel(NamedTuple):
    """A model as its authors published it."""

    name: str
    size: WanSize
    videos: tuple[Video, ...] = (SMALL, LARGE)
    files: int = 1
    """2 for the experts of a Wan 2.2 A14B model."""

    def file_bytes(self, recipe: Recipe) -> int:
        """Return the bytes of the tensors of one file, whose source is in bfloat16."""
        return sum(spec.nbytes for spec in tensor_specs(self.size, recipe))

    def job(self, video: Video) -> SamplingJob:
        """Return the sampling of a video: with one picture for image-to-video of Wan 2.1, with two videos for VACE."""
        plain = SamplingJob.for_video(*video, channels=self.size.out_dim)
        if self.size.image:
            return plain.with_entries(**clip_vision_entries(_CLIP_VISION_TOKENS))
        return plain.with_control_videos(_VACE_VIDEOS) if self.size.vace_layers else plain

    def simulator(self, recipe: Recipe, *, loras: int = 0, rank: int = 64) -> Simulator:
        """Return the simulator of a file in this recipe, with `loras` LoRAs on every quantized layer."""
        specs = tensor_specs(self.size, recipe)
        shapes, types = ({spec.name: getattr(spec, what) for spec in specs} for what in ("shape", "qtype"))
        patcher = ModelPatcher(meta_model(shapes, types), META, META)
        for _ in range(loras):
            patches = {
                key: _lora(each.out_features, each.in_features, rank) for key, each in packed_modules(patcher.model)
            }
            patcher.add_patches(patches)
        return Simulator.from_patcher(patcher)


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


class _Source(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16


def tensor_specs(size: WanSize, recipe: Recipe) -> list[TensorSpec]:
    """Return the tensors of a file in this recipe, whose source is in bfloat16."""
    shapes = transformer_shapes(size)
    types = plan_types(recipe, {name: _Source(shape) for name, shape in shapes.items()}).types
    return [TensorSpec(name, types[name], shape) for name, shape in shapes.items()]


def _lora(rows: int, columns: int, rank: int) -> LoRAAdapter:
    shapes = (rows, rank), (rank, columns)
    up, down = (torch.empty(*shape, dtype=torch.bfloat16, device=META) for shape in shapes)
    return LoRAAdapter(set(), (up, down, None, None, None, None))
