"""Wan's modulation: shift, scale and gate vectors that depend on the time step, applied to a chunk of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import comfy.ldm.wan.model as wan
import comfy.model_management
import torch
from torch import Tensor

# A GPU's kernels work on tiles of this many tokens.
_ALIGNMENT = 128


def chunks(tokens: int, size: int) -> Iterator[slice]:
    """Yield slices of about equal length, at most `size` tokens, that cover `tokens` tokens in order."""
    count = max(1, -(-tokens // size))
    step = min(size, -(-tokens // count // _ALIGNMENT) * _ALIGNMENT)
    return (slice(start, min(start + step, tokens)) for start in range(0, tokens, step))


@dataclass
class Modulation:
    """The modulation vectors of a block or a head.

    ComfyUI repeats the vectors of a frame for each of its tokens. Here they are repeated only for one chunk at a time.
    """

    vectors: tuple[Tensor, ...]
    """Each (batch, 1 or frames, dim): one vector for all tokens, or one per frame."""
    tokens: int

    @classmethod
    def from_module(cls, module: wan.WanAttentionBlock | wan.Head, e: Tensor, x: Tensor) -> Modulation:
        """Return the vectors of `module` plus those of the time step.

        Args:
            e: vectors of the time step, floating point, (batch, 1 or frames, 1 or number of vectors, dim).
            x: input of the module, (batch, tokens, dim). The vectors get its dtype and device.
        """
        own: Tensor = comfy.model_management.cast_to(module.modulation, dtype=x.dtype, device=x.device)
        return cls((own + e).unbind(2), x.shape[1])

    def vector(self, index: int, chunk: slice) -> Tensor:
        """Return the vectors at `index` for a chunk of tokens, (batch, 1 or tokens of the chunk, dim), dtype kept."""
        vectors = self.vectors[index]
        frames = vectors.shape[1]
        if frames == 1:
            return vectors
        tokens_per_frame = -(-self.tokens // frames)
        return vectors[:, torch.arange(chunk.start, chunk.stop, device=vectors.device) // tokens_per_frame]

    def shift_and_scale(self, normalized: Tensor, index: int, chunk: slice) -> Tensor:
        """Return `normalized * (1 + scale) + shift`, in the memory of `normalized`.

        Args:
            normalized: a chunk of tokens after layer norm, floating point, (batch, tokens in the chunk, dim).
            index: of the shift vector; the scale vector follows it.
        """
        shift, scale = self.vector(index, chunk), self.vector(index + 1, chunk)
        return torch.addcmul(shift, normalized, 1 + scale, out=normalized)
