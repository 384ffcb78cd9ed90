"""What comes before and after the blocks, in pieces: the host's own takes three times the tokens' memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import comfy.ldm.wan.model as wan
import torch
from torch import Tensor

from ..host import Forwards
from .modulation import Modulation, chunks
from .weights import is_untouched, projection

_TOKENS = 4096
"""At a time, or one frame's."""

# Of the host's variants; each is called as `embedding(latent.float()).to(dtype)`.
_EMBEDDINGS = ("patch_embedding", "patch_embedding_global", "patch_embedding_pose", "vace_patch_embedding")
_HEADS = ("head", "head_global")


def edge_forwards(model: wan.WanModel, dtype: torch.dtype) -> Forwards:
    """Forwards in pieces of the patch embeddings, which give `dtype`, and of the heads.

    Source: comfy/ldm/wan/model.py Head.forward, WanModel.forward_orig, ComfyUI 0.30.0.
    """
    embeddings = [part for part in _parts(model, _EMBEDDINGS, torch.nn.Conv3d) if part.kernel_size[0] == 1]
    heads = _parts(model, _HEADS, wan.Head)
    return {part: partial(_embed, part, dtype) for part in embeddings} | {part: partial(_head, part) for part in heads}


def _parts(model: wan.WanModel, names: tuple[str, ...], kind: type[torch.nn.Module]) -> list[Any]:
    """Those that the model has and that no other node changed."""
    parts = [getattr(model, name, None) for name in names]
    return [part for part in parts if isinstance(part, kind) and is_untouched(part)]


def _embed(embedding: torch.nn.Conv3d, dtype: torch.dtype, latent: Tensor) -> Tensor:
    """(batch, dim, frames, rows, columns), stored token after token, so that no later copy makes it so."""
    batch, _, frames, *size = latent.shape
    rows, columns = (side // kernel for side, kernel in zip(size, embedding.kernel_size[1:], strict=True))
    tokens = latent.new_empty(batch, frames, rows, columns, embedding.out_channels, dtype=dtype).movedim(-1, 1)
    step = max(1, _TOKENS // (rows * columns))
    for start in range(0, frames, step):
        some = slice(start, start + step)
        tokens[:, :, some] = type(embedding).forward(embedding, latent[:, :, some])
    return tokens


def _head(head: wan.Head, x: Tensor, e: Tensor) -> Tensor:
    """(batch, tokens, values of a patch)."""
    modulation = Modulation.from_module(head, (e.unsqueeze(1) if e.ndim < 3 else e).unsqueeze(2), x)
    project, out = projection(head.head, x), x.new_empty(*x.shape[:2], head.head.out_features)
    for chunk in chunks(x.shape[1], _TOKENS):
        out[:, chunk] = project(modulation.shift_and_scale(head.norm(x[:, chunk]), 0, chunk))
    return out
