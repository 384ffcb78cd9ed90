"""Scores of clips: whether color and motion are those of the caption, by simple statistics of the pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from wanquant.bench.tinywan.data import (
    CHANNELS,
    COLOURS,
    FRAMES,
    MOTIONS,
    SIZE,
    Caption,
    embed,
    hue,
    noise_level,
    to_pictures,
)
from wanquant.bench.tinywan.model import Model

_CHROMA = 0.25
_TRAVEL = 4.0


def right(latents: Tensor, captions: Sequence[Caption]) -> Tensor:
    """Return whether color and motion are those of the caption: bool, (clips, 2).

    Args:
        latents: float32, (clips, CHANNELS, FRAMES, SIZE, SIZE), in model space.
    """
    seen = [detect(clip) or ("none", "none") for clip in to_pictures(latents)]
    pairs = zip(seen, captions, strict=True)
    return torch.tensor([(colour == caption.colour, motion == caption.motion) for (colour, motion), caption in pairs])


def detect(clip: Tensor) -> tuple[str, str] | None:
    """Return color and motion of the one colored thing in a clip, or None if a frame has none.

    Args:
        clip: float32, (3, FRAMES, SIZE, SIZE) in 0..1.
    """
    chroma = (clip.amax(0) - clip.amin(0) - _CHROMA).clamp(min=0)
    mass = chroma.sum((1, 2))
    if mass.min() < 1:
        return None
    mean = ((clip * chroma).sum((1, 2, 3)) / mass.sum()).tolist()
    colour = min(COLOURS, key=lambda name: _angle(hue(COLOURS[name]) - hue(mean)))
    cell = torch.arange(SIZE, dtype=clip.dtype)
    x, y = ((chroma.sum(1) * cell).sum(1) / mass).tolist(), ((chroma.sum(2) * cell).sum(1) / mass).tolist()
    return colour, _motion(x, y)


def _angle(difference: float) -> float:
    return abs((difference + math.pi) % (2 * math.pi) - math.pi)


def _motion(x: list[float], y: list[float]) -> str:
    """Return the direction of the way from the first frame to the last, or "none" if it is short."""
    dx, dy = x[-1] - x[0], y[-1] - y[0]
    ways = {name: right * dx + down * dy for name, (right, down) in MOTIONS.items()}
    motion = max(ways, key=lambda name: ways[name])
    return motion if ways[motion] >= _TRAVEL else "none"


@torch.no_grad()
def generate(model: Model, captions: Sequence[Caption], *, seed: int, steps: int = 8, batch: int = 16) -> Tensor:
    """Sample clips by Euler's method on Wan's schedule; the noise depends only on the seed.

    Returns:
        float32, (captions, CHANNELS, FRAMES, SIZE, SIZE), in model space.
    """
    levels = noise_level(torch.linspace(1, 0, steps + 1)).tolist()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(captions), CHANNELS, FRAMES, SIZE, SIZE, generator=generator)
    clips = []
    for x, text in zip(noise.split(batch), embed(captions).split(batch), strict=True):
        for level, lower in pairwise(levels):
            x = x + (lower - level) * model(x, torch.full((len(x),), 1000 * level), text)
        clips.append(x)
    return torch.cat(clips)
