"""Shift, scale and gate by the time step, made for no more tokens than are at work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import comfy.ldm.wan.model as wan
import comfy.model_management
import torch
from torch import Tensor


def chunks(tokens: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `tokens`."""
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


@dataclass
class Modulation:
    """Vectors for each token, of which the host gives one set for all tokens or one a frame."""

    vectors: tuple[Tensor, ...]
    """Each (batch, 1 or frames, dim)."""
    tokens: int

    @classmethod
    def from_module(cls, module: wan.WanAttentionBlock | wan.Head, e: Tensor, x: Tensor) -> Modulation:
        """A module's own vectors plus those of the time step.

        Args:
            e: (batch, 1 or frames, 1 or the number of vectors, dim).
            x: (batch, tokens, dim), whose dtype and device the vectors get.
        """
        own: Tensor = comfy.model_management.cast_to(module.modulation, dtype=x.dtype, device=x.device)
        return cls((own + e).unbind(2), x.shape[1])

    def vector(self, index: int, chunk: slice) -> Tensor:
        """(batch, 1 or the chunk's tokens, dim)."""
        vectors = self.vectors[index]
        frames = vectors.shape[1]
        if frames == 1:
            return vectors
        tokens_a_frame = -(-self.tokens // frames)
        return vectors[:, torch.arange(chunk.start, chunk.stop, device=vectors.device) // tokens_a_frame]

    def shift_and_scale(self, normalized: Tensor, index: int, chunk: slice) -> Tensor:
        """A chunk modulated by the vectors at `index` and after it, written over `normalized`."""
        shift, scale = self.vector(index, chunk), self.vector(index + 1, chunk)
        return torch.addcmul(shift, normalized, 1 + scale, out=normalized)
