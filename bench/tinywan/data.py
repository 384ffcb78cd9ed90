"""The clips that TinyWan learns: a colored shape moves over gray ground, drawn as a Wan latent.

A caption is three words. The shape leaves a fading trail, as in a long exposure. Wan knows only the distance of two
places, not their positions, so motion shows only in the comparison of frames. The trail makes the word for the
direction matter inside each frame as well, so that it is learned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import comfy.latent_formats
import torch
from torch import Tensor

COLOURS = {
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.8, 0.1),
    "blue": (0.1, 0.2, 0.9),
    "yellow": (0.9, 0.85, 0.1),
    "cyan": (0.1, 0.85, 0.9),
    "magenta": (0.9, 0.1, 0.85),
}
SHAPES = ("ball", "square", "triangle")
MOTIONS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}
"""Directions (x, y), where y points down."""
WORDS = (*COLOURS, *SHAPES, *MOTIONS)
FRAMES, SIZE, CHANNELS, TEXT_DIM = 5, 16, 16, 4096
"""The latent of a clip is (CHANNELS, FRAMES, SIZE, SIZE); lengths below are in latent cells."""

SPEED = 1.5
"""Cells per frame."""

_OVERSAMPLING = 2
_HIDDEN_SCALE = 2.5
_TRAIL, _ECHOES = 4.0, 6


@dataclass(frozen=True)
class Caption:
    colour: str
    shape: str
    motion: str

    @property
    def words(self) -> tuple[str, str, str]:
        return self.colour, self.shape, self.motion

    def __str__(self) -> str:
        return f"a {self.colour} {self.shape} moves {self.motion}"


def _held_out(caption: Caption) -> bool:
    """Return whether a caption is in the held-out quarter; every word and every pair occurs outside it."""
    indices = (list(COLOURS).index(caption.colour), SHAPES.index(caption.shape), list(MOTIONS).index(caption.motion))
    return sum(indices) % 4 == 0


CAPTIONS = tuple(Caption(*words) for words in product(COLOURS, SHAPES, MOTIONS))
HELD_OUT = tuple(filter(_held_out, CAPTIONS))
TRAINING = tuple(caption for caption in CAPTIONS if not _held_out(caption))


def word_embeddings() -> dict[str, Tensor]:
    """Return one fixed vector per word: float32, (TEXT_DIM,), standard normal, rounded to bfloat16."""
    table = torch.randn(len(WORDS), TEXT_DIM, generator=torch.Generator().manual_seed(0))
    return dict(zip(WORDS, table.bfloat16().float(), strict=True))


def embed(captions: Sequence[Caption]) -> Tensor:
    """Return the embedded captions: float32, (captions, 3 tokens, TEXT_DIM)."""
    table = word_embeddings()
    return torch.stack([torch.stack([table[word] for word in caption.words]) for caption in captions])


def draw(captions: Sequence[Caption], generator: torch.Generator, size: int = SIZE) -> Tensor:
    """Draw float32 (captions, 3, FRAMES, size, size) in 0..1, with random sizes, places and grounds of the shapes."""
    chance = torch.rand(len(captions), 7, generator=generator)
    position = (torch.arange(size * _OVERSAMPLING) + 0.5) / _OVERSAMPLING
    seen = _shapes(captions, chance[:, :3], position, size)
    ground = _grounds(chance[:, 3:], position)
    colours = torch.tensor([COLOURS[caption.colour] for caption in captions]).view(-1, 3, 1, 1, 1)
    pictures = torch.lerp(ground.expand(-1, 3, FRAMES, -1, -1), colours, seen.unsqueeze(1))
    return torch.nn.functional.avg_pool3d(pictures, (1, _OVERSAMPLING, _OVERSAMPLING))


def _shapes(captions: Sequence[Caption], chance: Tensor, position: Tensor, size: int) -> Tensor:
    """Return the coverage by the shape or its trail: (captions, frames, places, places) in 0..1."""
    way = torch.tensor([MOTIONS[caption.motion] for caption in captions], dtype=torch.float32)
    half = SPEED * (FRAMES - 1) / 2
    # The middle of the way may be anywhere as long as the whole way lies inside the picture.
    margin = torch.where(way != 0, half + 0.5, 1.0)
    middle = margin + (size - 2 * margin) * chance[:, :2]
    times = SPEED * torch.arange(FRAMES) - half
    centres = middle.unsqueeze(1) + way.unsqueeze(1) * times.view(1, -1, 1)
    radius = (1.9 + 0.6 * chance[:, 2]).view(-1, 1, 1, 1)
    kinds = torch.tensor([SHAPES.index(caption.shape) for caption in captions]).view(-1, 1, 1, 1)
    echoes = []
    for echo in range(_ECHOES):
        x, y = (centres - way.unsqueeze(1) * (_TRAIL * echo / _ECHOES)).unbind(-1)
        dx, dy = position - x[:, :, None, None], position.view(-1, 1) - y[:, :, None, None]
        echoes.append((1 - echo / _ECHOES) * _inside(kinds, dx, dy, radius))
    return torch.stack(echoes).amax(0)


def _inside(kinds: Tensor, dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """Return whether offsets from a shape's center lie inside it; `kinds` are indices of SHAPES."""
    ball = dx.square() + dy.square() <= radius**2
    square = torch.maximum(dx.abs(), dy.abs()) <= 0.85 * radius
    triangle = (dy <= 0.8 * radius) & (dx.abs() <= 0.6 * (dy + 1.1 * radius))
    return torch.where(kinds == 0, ball, torch.where(kinds == 1, square, triangle))


def _grounds(chance: Tensor, position: Tensor) -> Tensor:
    """Return gray grounds (captions, 1, 1, places, places), a quarter checkered; `chance` is uniform, (captions, 4)."""
    brightness, shift_x, shift_y, kind = chance.view(-1, 4, 1, 1, 1, 1).unbind(1)
    checks = ((position + 8 * shift_x) // 4 + (position.view(-1, 1) + 8 * shift_y) // 4) % 2
    return 0.35 + 0.15 * brightness + 0.08 * checks * (kind < 0.25)


def _colour_maps() -> tuple[Tensor, Tensor, Tensor]:
    """Return factors (channels, 3) and bias (3,) from a latent to colors, and a right inverse (3, channels).

    The inverse also writes the picture into three directions that the colors do not show, so that all channels are
    used and have about the scale of Wan's.
    """
    latent_format = comfy.latent_formats.Wan21()
    factors = torch.tensor(latent_format.latent_rgb_factors)
    bias = torch.tensor(latent_format.latent_rgb_factors_bias)
    unseen = torch.linalg.qr(factors, mode="complete").Q[:, 3:6].T
    return factors, bias, torch.linalg.pinv(factors) + _HIDDEN_SCALE * unseen


def to_latent(pictures: Tensor) -> Tensor:
    """Convert pictures to latents in model space without a VAE.

    Args:
        pictures: float32, (batch, 3, frames, height, width) in 0..1.

    Returns:
        float32, (batch, CHANNELS, frames, height, width).
    """
    _, bias, inverse = _colour_maps()
    return torch.einsum("brthw,rc->bcthw", 2 * pictures - 1 - bias.view(3, 1, 1, 1), inverse)


def to_pictures(latents: Tensor) -> Tensor:
    """Return the colors of ComfyUI's latent preview, one pixel per cell.

    Args:
        latents: float32, (batch, CHANNELS, frames, height, width), in model space.

    Returns:
        float32, (batch, 3, frames, height, width) in 0..1.
    """
    factors, bias, _ = _colour_maps()
    return (torch.einsum("bcthw,cr->brthw", latents, factors) + bias.view(3, 1, 1, 1)).add(1).div(2).clamp(0, 1)


def noise_level(share: Tensor, shift: float = 8.0) -> Tensor:
    """Return the noise level after a share of Wan's schedule, both in 0..1 and of any shape.

    Source: arXiv 2403.03206, equation 23.
    """
    return shift * share / (1 + (shift - 1) * share)


def hue(colour: Sequence[float]) -> float:
    """Return the angle of an RGB color in the plane of equal brightness, in radians."""
    red, green, blue = colour
    return math.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)
