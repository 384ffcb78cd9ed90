"""What is to be sampled, as far as the memory of a forward depends on it."""

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
from .meta_wan import META

_CLIP_WIDTH = 1280
_PLAIN = (bool, int, float, str)


@dataclass(frozen=True)
class Condition:
    """A conditioning without its values: the fields of the host's, a tensor as its shape and dtype."""

    form: Hashable = ()

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Condition:
        """What is neither tensor, plain, nor made of these (a ControlNet, hooks) is left out."""
        return cls(_form(dict(fields)))

    def fields(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """With tensors of one repeated value, which take no memory, for those in main memory; others are on meta."""
        return dict(_filled(self.form, torch.device(device)) if self.form else {})


PROMPTS = (Condition(), Condition())
"""Text alone, positive and negative."""


def image_fields(tokens: int) -> dict[str, Any]:
    """Of a conditioning with what CLIP vision saw, 257 tokens an image."""
    seen = Output()
    seen.penultimate_hidden_states = torch.empty(()).expand(1, tokens, _CLIP_WIDTH)
    return {"clip_vision_output": seen}


@dataclass(frozen=True)
class Job:
    """One sampling."""

    latent: tuple[int, ...]
    """(batch, channels, frames, height, width)."""
    conditions: tuple[Condition, ...] = PROMPTS

    @classmethod
    def of_video(cls, width: int, height: int, frames: int, *, channels: int = 16) -> Job:
        """One video of so many pixels from text.

        Args:
            channels: of the latent: 16 for Wan 2.1's VAE, 48 for Wan 2.2's.

        Raises:
            QuantError: sizes or frames that Wan cannot take.
        """
        step = 2 * pixels_per_cell(channels)
        if width < step or height < step or width % step or height % step:
            raise QuantError(f"size {width}x{height}: this Wan model takes multiples of {step} from {step} on")
        if frames < 1 or frames % 4 != 1:
            raise QuantError(f"frames {frames}: Wan takes 1, 5, 9, ... (a multiple of 4 and 1 more)")
        size = height // pixels_per_cell(channels), width // pixels_per_cell(channels)
        return cls((1, channels, frames // 4 + 1, *size))

    def given(self, **fields: Any) -> Job:  # noqa: ANN401
        """With these fields in the positive and in the negative conditioning, as the host's nodes put them there."""
        return replace(self, conditions=(Condition.of(fields),) * 2)

    def with_controls(self, count: int) -> Job:
        """With so many control videos for VACE."""
        batch, channels, *size = self.latent
        video = torch.empty(()).expand(batch, 2 * channels, *size)
        mask = torch.empty(()).expand(batch, 64, *size)
        return self.given(vace_frames=[video] * count, vace_mask=[mask] * count, vace_strength=[1.0] * count)

    def from_text(self, frames: int) -> Job:
        """A video of the same size from text alone, of so many latent frames."""
        batch, channels, _, *size = self.latent
        return Job((batch, channels, frames, *size))

    def __str__(self) -> str:
        batch, channels, frames, height, width = self.latent
        side = pixels_per_cell(channels)
        videos = f"{batch} videos of " if batch > 1 else ""
        return f"{videos}{side * width}x{side * height}, {4 * frames - 3} frames"


class _Form(NamedTuple):
    """Of a tensor."""

    shape: torch.Size
    dtype: torch.dtype
    is_cpu: bool


class _Fields(NamedTuple):
    """Of a dict or an object."""

    make: type
    items: tuple[tuple[str, Hashable], ...]


def _form(value: Any) -> Hashable:  # noqa: ANN401
    if isinstance(value, Tensor):
        return _Form(value.shape, value.dtype, value.is_cpu)
    if isinstance(value, Output):
        return _Fields(SimpleNamespace, _items(vars(value)))
    if isinstance(value, dict):
        return _Fields(dict, _items(value))
    if isinstance(value, list | tuple):
        return tuple(_form(item) for item in value)
    return value if isinstance(value, _PLAIN) else None


def _items(fields: dict[str, Any]) -> tuple[tuple[str, Hashable], ...]:
    return tuple((name, form) for name, value in fields.items() if (form := _form(value)) is not None)


def _filled(form: Hashable, device: torch.device) -> Any:  # noqa: ANN401
    if isinstance(form, _Form):
        one = torch.zeros((), dtype=form.dtype, device=device)
        return one.expand(form.shape) if form.is_cpu else torch.empty(form.shape, dtype=form.dtype, device=META)
    if isinstance(form, _Fields):
        return form.make(**{name: _filled(value, device) for name, value in form.items})
    if isinstance(form, tuple):
        return [_filled(item, device) for item in form]
    return form
