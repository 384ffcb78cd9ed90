"""The clips that TinyWan learns: a coloured shape moves over grey ground, drawn as a Wan latent.

Captions are three words. A shape leaves a fading trail, as in a long exposure. Wan knows only how far apart two places
are, not where they are, and that a shape moves on is seen only by comparing frames with the word for its direction; the
trail makes that word matter inside each frame as well, and so it is learned.
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
"""Directions of (x, y), y downwards."""
WORDS = (*COLOURS, *SHAPES, *MOTIONS)
FRAMES, SIZE, CHANNELS, TEXT_DIM = 5, 16, 16, 4096
"""A clip's latent: (CHANNELS, FRAMES, SIZE, SIZE); lengths below are in latent cells."""

SPEED = 1.5
"""Cells a frame."""

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
    """One combination in four: each word, and each pair of words, is still learned from the others."""
    indices = (list(COLOURS).index(caption.colour), SHAPES.index(caption.shape), list(MOTIONS).index(caption.motion))
    return sum(indices) % 4 == 0


CAPTIONS = tuple(Caption(*words) for words in product(COLOURS, SHAPES, MOTIONS))
HELD_OUT = tuple(filter(_held_out, CAPTIONS))
TRAINING = tuple(caption for caption in CAPTIONS if not _held_out(caption))


def word_embeddings() -> dict[str, Tensor]:
    """One fixed vector (TEXT_DIM,) a word, standard normal, rounded to bfloat16."""
    table = torch.randn(len(WORDS), TEXT_DIM, generator=torch.Generator().manual_seed(0))
    return dict(zip(WORDS, table.bfloat16().float(), strict=True))


def embed(captions: Sequence[Caption]) -> Tensor:
    """(captions, 3 tokens, TEXT_DIM)."""
    table = word_embeddings()
    return torch.stack([torch.stack([table[word] for word in caption.words]) for caption in captions])


def draw(captions: Sequence[Caption], generator: torch.Generator, size: int = SIZE) -> Tensor:
    """Pictures (captions, 3, FRAMES, size, size) in 0..1, with random sizes, places and grounds."""
    chance = torch.rand(len(captions), 7, generator=generator)
    position = (torch.arange(size * _OVERSAMPLING) + 0.5) / _OVERSAMPLING
    seen = _shapes(captions, chance[:, :3], position, size)
    ground = _grounds(chance[:, 3:], position)
    colours = torch.tensor([COLOURS[caption.colour] for caption in captions]).view(-1, 3, 1, 1, 1)
    pictures = torch.lerp(ground.expand(-1, 3, FRAMES, -1, -1), colours, seen.unsqueeze(1))
    return torch.nn.functional.avg_pool3d(pictures, (1, _OVERSAMPLING, _OVERSAMPLING))


def _shapes(captions: Sequence[Caption], chance: Tensor, position: Tensor, size: int) -> Tensor:
    """How much of the shape, or of its trail, is at each place: (captions, frames, places, places) in 0..1."""
    way = torch.tensor([MOTIONS[caption.motion] for caption in captions], dtype=torch.float32)
    half = SPEED * (FRAMES - 1) / 2
    # Half-way it may be anywhere from where the whole way lies inside the picture.
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
    """Whether a place is in the shape around it; `kinds` are indices of SHAPES."""
    ball = dx.square() + dy.square() <= radius**2
    square = torch.maximum(dx.abs(), dy.abs()) <= 0.85 * radius
    triangle = (dy <= 0.8 * radius) & (dx.abs() <= 0.6 * (dy + 1.1 * radius))
    return torch.where(kinds == 0, ball, torch.where(kinds == 1, square, triangle))


def _grounds(chance: Tensor, position: Tensor) -> Tensor:
    """Grey (captions, 1, 1, places, places), one in four chequered; `chance` are uniform draws (captions, 4)."""
    brightness, shift_x, shift_y, kind = chance.view(-1, 4, 1, 1, 1, 1).unbind(1)
    checks = ((position + 8 * shift_x) // 4 + (position.view(-1, 1) + 8 * shift_y) // 4) % 2
    return 0.35 + 0.15 * brightness + 0.08 * checks * (kind < 0.25)


def _colour_maps() -> tuple[Tensor, Tensor, Tensor]:
    """Factors (channels, 3) and bias (3,) from a latent to colours, and a right inverse (3, channels) of the factors.

    The inverse puts the picture also into three directions that the colours do not show, so that all channels carry
    something and have about the size that Wan's have.
    """
    latent_format = comfy.latent_formats.Wan21()
    factors = torch.tensor(latent_format.latent_rgb_factors)
    bias = torch.tensor(latent_format.latent_rgb_factors_bias)
    unseen = torch.linalg.qr(factors, mode="complete").Q[:, 3:6].T
    return factors, bias, torch.linalg.pinv(factors) + _HIDDEN_SCALE * unseen


def to_latent(pictures: Tensor) -> Tensor:
    """Colours (batch, 3, frames, height, width) in 0..1 to a latent in model space, without a VAE."""
    _, bias, inverse = _colour_maps()
    return torch.einsum("brthw,rc->bcthw", 2 * pictures - 1 - bias.view(3, 1, 1, 1), inverse)


def to_pictures(latents: Tensor) -> Tensor:
    """The colours that the latent preview shows of latents in model space, one pixel a cell, in 0..1."""
    factors, bias, _ = _colour_maps()
    return (torch.einsum("bcthw,cr->brthw", latents, factors) + bias.view(3, 1, 1, 1)).add(1).div(2).clamp(0, 1)


def noise_level(share: Tensor, shift: float = 8.0) -> Tensor:
    """Wan's schedule: how far of the way (0 none, 1 all) to the noise level. Source: arXiv 2403.03206, equation 23."""
    return shift * share / (1 + (shift - 1) * share)


def hue(colour: Sequence[float]) -> float:
    """Angle of an RGB colour in the plane of equal brightness, in radians."""
    red, green, blue = colour
    return math.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)
