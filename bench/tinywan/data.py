"""The clips that TinyWan learns: a coloured shape moves over grey ground, drawn as a Wan latent.

Captions are three words. A shape that moves leaves a fading trail, as in a long exposure. Wan knows only how far apart
two places are, not where they are: a direction is learned only by comparing frames, long after colours and shapes. The
trail shows it inside each frame as well.
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

_OVERSAMPLING = 2
_HIDDEN_SCALE = 2.5
_TRAIL, _ECHOES = 4.5, 6


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
    """One fixed vector (TEXT_DIM,) a word, normal with a deviation of 0.1, rounded to bfloat16."""
    table = 0.1 * torch.randn(len(WORDS), TEXT_DIM, generator=torch.Generator().manual_seed(0))
    return dict(zip(WORDS, table.bfloat16().float(), strict=True))


def embed(captions: Sequence[Caption]) -> Tensor:
    """(captions, 3 tokens, TEXT_DIM)."""
    table = word_embeddings()
    return torch.stack([torch.stack([table[word] for word in caption.words]) for caption in captions])


def draw(captions: Sequence[Caption], generator: torch.Generator) -> Tensor:
    """Pictures (captions, 3, FRAMES, SIZE, SIZE) in 0..1, with random sizes, speeds, places and grounds."""
    position = (torch.arange(SIZE * _OVERSAMPLING) + 0.5) / _OVERSAMPLING
    x, y = position.expand(SIZE * _OVERSAMPLING, -1), position.view(-1, 1).expand(-1, SIZE * _OVERSAMPLING)
    clips = [_draw_one(caption, x, y, torch.rand(9, generator=generator).tolist()) for caption in captions]
    return torch.nn.functional.avg_pool3d(torch.stack(clips), (1, _OVERSAMPLING, _OVERSAMPLING))


def _draw_one(caption: Caption, x: Tensor, y: Tensor, chance: list[float]) -> Tensor:
    """One clip at the finer resolution; `chance` are uniform draws."""
    radius = 2.5 + chance[0]
    start, end = radius + chance[1] * (5 - radius), 11 + chance[2] * (5 - radius)
    speed, aside = 0.8 + 0.4 * chance[3], 4 + 8 * chance[4]
    checks = ((x + 8 * chance[5]) // 4 + (y + 8 * chance[6]) // 4) % 2
    ground = 0.3 + 0.25 * chance[7] + (0.08 * checks if chance[8] < 0.25 else 0 * checks)
    colour = torch.tensor(COLOURS[caption.colour]).view(3, 1, 1)
    right, down = MOTIONS[caption.motion]
    frames = []
    for frame in range(FRAMES):
        place = start + (end - start) * (frame / (FRAMES - 1)) ** speed
        place = place if right + down > 0 else SIZE - place
        dx, dy = x - (place if right else aside), y - (place if down else aside)
        echoes = (_TRAIL * echo / _ECHOES for echo in range(_ECHOES))
        seen = [
            (1 - behind / _TRAIL) * _inside(caption.shape, dx + right * behind, dy + down * behind, radius)
            for behind in echoes
        ]
        frames.append(torch.lerp(ground.expand(3, -1, -1), colour, torch.stack(seen).amax(0)))
    return torch.stack(frames, dim=1)


def _inside(shape: str, dx: Tensor, dy: Tensor, radius: float) -> Tensor:
    if shape == "ball":
        return dx.square() + dy.square() <= radius**2
    if shape == "square":
        return torch.maximum(dx.abs(), dy.abs()) <= 0.85 * radius
    return (dy <= 0.8 * radius) & (dx.abs() <= 0.6 * (dy + 1.1 * radius))


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
