"""A sampling, described by all that the memory of a forward depends on: the latent's shape and the conditionings."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from comfy.clip_vision import Output
from torch import Tensor

from ...quant import QuantError
from ...quant.plan.wan_shapes import pixels_per_cell
from ...quant.units import counted
from .meta_wan import META

_CLIP_WIDTH = 1280
_PLAIN = (bool, int, float, str)


@dataclass(frozen=True)
class ConditioningOutline:
    """The entries of one of ComfyUI's conditionings, with a shape and a dtype in place of each tensor.

    Outlines are hashable. Those of conditionings that differ only in the values of their tensors are equal.
    """

    outline: Hashable = ()

    @classmethod
    def from_entries(cls, entries: Mapping[str, Any]) -> ConditioningOutline:
        """Return the outline of a conditioning's dict.

        Only tensors, plain values, CLIP vision outputs, and dicts and lists of these are kept. Others, such as a
        ControlNet or hooks, are left out.
        """
        return cls(_outline(dict(entries)))

    def entries(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """Return a conditioning's dict of this outline, with stand-ins for the tensors.

        A tensor in main memory becomes one zero, expanded to its shape, on `device`. Every other tensor becomes a meta
        tensor.
        """
        return dict(_stand_in(self.outline, torch.device(device)) if self.outline else {})


TEXT_ONLY = (ConditioningOutline(), ConditioningOutline())
"""A positive and a negative prompt."""


def clip_vision_entries(tokens: int) -> dict[str, Any]:
    """Return the entries that a CLIP vision output adds to a conditioning, with 257 tokens per image."""
    output = Output()
    output.penultimate_hidden_states = torch.empty(()).expand(1, tokens, _CLIP_WIDTH)
    return {"clip_vision_output": output}


@dataclass(frozen=True)
class SamplingJob:
    """One sampling: the shape of its latent and the outlines of its conditionings."""

    latent: tuple[int, ...]
    """(batch, channels, frames, height, width)."""
    conditionings: tuple[ConditioningOutline, ...] = TEXT_ONLY
    frames_at_a_time: int | None = None
    """Latent frames in a forward, if a causal model's sampler or context windows cut the video; None for all."""

    @classmethod
    def for_video(cls, width: int, height: int, frames: int, *, channels: int = 16) -> SamplingJob:
        """Return the job of one text-to-video sampling.

        Args:
            width: in pixels, like `height`.
            frames: of the video.
            channels: of the latent: 16 for Wan 2.1's VAE, 48 for Wan 2.2's.

        Raises:
            QuantError: the model does not support this size or number of frames.
        """
        step = 2 * pixels_per_cell(channels)
        if width < step or height < step or width % step or height % step:
            raise QuantError(
                f"size {width}x{height}: expected multiples of {step} pixels for this Wan model;"
                f" choose a width and a height of {step}, {2 * step}, {3 * step}, ... pixels"
            )
        if frames < 1 or frames % 4 != 1:
            raise QuantError(
                f"frames {frames}: expected a multiple of 4 plus 1 for a Wan model; choose 1, 5, 9, 13, ..."
            )
        size = height // pixels_per_cell(channels), width // pixels_per_cell(channels)
        return cls((1, channels, frames // 4 + 1, *size))

    def with_entries(self, **entries: Any) -> SamplingJob:  # noqa: ANN401
        """Return this job with `entries` in both conditionings, as ComfyUI's nodes set them."""
        return replace(self, conditionings=(ConditioningOutline.from_entries(entries),) * 2)

    def with_control_videos(self, count: int) -> SamplingJob:
        """Return this job with `count` control videos for VACE."""
        batch, channels, *size = self.latent
        video = torch.empty(()).expand(batch, 2 * channels, *size)
        mask = torch.empty(()).expand(batch, 64, *size)
        return self.with_entries(vace_frames=[video] * count, vace_mask=[mask] * count, vace_strength=[1.0] * count)

    def text_only(self, latent: tuple[int, ...]) -> SamplingJob:
        """Return a text-to-video job with this latent that is sampled in the same way."""
        return SamplingJob(latent, frames_at_a_time=self.frames_at_a_time)

    def __str__(self) -> str:
        batch, channels, frames, height, width = self.latent
        side = pixels_per_cell(channels)
        videos = f"{batch} videos of " if batch > 1 else ""
        size = f"{videos}{side * width}x{side * height}, {counted(video_frames(frames), 'frame')}"
        at_once = min(frames, self.frames_at_a_time or frames)
        return size if at_once == frames else f"{size}, {video_frames(at_once)} at a time"


def video_frames(latent_frames: int) -> int:
    """Return the frames of the video: one for the first latent frame and four for each further one."""
    return 4 * latent_frames - 3


class _TensorOutline(NamedTuple):
    shape: torch.Size
    dtype: torch.dtype
    in_main_memory: bool


class _ObjectOutline(NamedTuple):
    """The outline of a dict, or of an object by its attributes."""

    make: type
    items: tuple[tuple[Hashable, Hashable], ...]


def _outline(value: Any) -> Hashable:  # noqa: ANN401
    if isinstance(value, Tensor):
        return _TensorOutline(value.shape, value.dtype, value.is_cpu)
    if isinstance(value, Output):
        return _ObjectOutline(SimpleNamespace, _item_outlines(vars(value)))
    if isinstance(value, dict):
        return _ObjectOutline(dict, _item_outlines(value))
    if isinstance(value, list | tuple):
        return tuple(_outline(item) for item in value)
    return value if isinstance(value, _PLAIN) else None


def _item_outlines(items: dict[Any, Any]) -> tuple[tuple[Hashable, Hashable], ...]:
    return tuple((name, outline) for name, value in items.items() if (outline := _outline(value)) is not None)


def _stand_in(outline: Hashable, device: torch.device) -> Any:  # noqa: ANN401
    if isinstance(outline, _TensorOutline):
        if not outline.in_main_memory:
            return torch.empty(outline.shape, dtype=outline.dtype, device=META)
        return torch.zeros((), dtype=outline.dtype, device=device).expand(outline.shape)
    if isinstance(outline, _ObjectOutline):
        items: dict[Any, Any] = {name: _stand_in(value, device) for name, value in outline.items}
        return items if outline.make is dict else outline.make(**items)
    if isinstance(outline, tuple):
        return [_stand_in(item, device) for item in outline]
    return outline
