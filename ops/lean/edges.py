"""The patch embeddings, the camera's adapter and the head, before and after the blocks, in pieces.

ComfyUI's own need three times the memory of the tokens or more.
"""

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
"""The number of tokens to process at a time; a patch embedding processes at least one frame."""

# ComfyUI calls each of these as `embedding(latent.float()).to(dtype)`.
_EMBEDDINGS = (
    "patch_embedding",
    "patch_embedding_global",
    "patch_embedding_mask",
    "patch_embedding_pose",
    "vace_patch_embedding",
)
_HEADS = ("head", "head_global")


def edge_forwards(model: wan.WanModel, dtype: torch.dtype) -> Forwards:
    """Return forwards in pieces for the patch embeddings, the camera's adapter and the heads of `model`.

    Args:
        dtype: of the tokens.

    Source: comfy/ldm/wan/model.py Head.forward, WanModel.forward_orig, ComfyUI 0.30.0.
    """
    embeddings = [part for part in _parts(model, _EMBEDDINGS, torch.nn.Conv3d) if part.kernel_size[0] == 1]
    forwards: Forwards = {part: partial(_embed, part, dtype) for part in embeddings}
    forwards |= {part: partial(_adapt, part) for part in _parts(model, ("control_adapter",), wan.WanCamAdapter)}
    return forwards | {part: partial(_head, part) for part in _parts(model, _HEADS, wan.Head)}


def _parts(model: wan.WanModel, names: tuple[str, ...], kind: type[torch.nn.Module]) -> list[Any]:
    """Return the modules of these names that the model has and whose forwards no other node replaced or hooked."""
    parts = [getattr(model, name, None) for name in names]
    return [part for part in parts if isinstance(part, kind) and is_untouched(part)]


def _embed(embedding: torch.nn.Conv3d, dtype: torch.dtype, latent: Tensor) -> Tensor:
    """Return the tokens, (batch, dim, frames, rows, columns), with the dim of each token contiguous.

    ComfyUI would make them contiguous with a copy.

    Args:
        latent: float32, (batch, channels, frames, height, width).
    """
    batch, _, frames, *size = latent.shape
    rows, columns = (side // kernel for side, kernel in zip(size, embedding.kernel_size[1:], strict=True))
    tokens = latent.new_empty(batch, frames, rows, columns, embedding.out_channels, dtype=dtype).movedim(-1, 1)
    step = max(1, _TOKENS // (rows * columns))
    for start in range(0, frames, step):
        chunk = slice(start, start + step)
        tokens[:, :, chunk] = type(embedding).forward(embedding, latent[:, :, chunk])
    return tokens


def _adapt(adapter: wan.WanCamAdapter, camera: Tensor) -> Tensor:
    """Return what `WanCamAdapter.forward` adds to the tokens, (batch, dim, frames, rows, columns), dtype kept.

    Args:
        camera: the rays of each pixel, floating point, (batch, channels, frames, height, width).
    """
    pixels, kernel = adapter.pixel_unshuffle.downscale_factor, adapter.conv.kernel_size
    rows, columns = (side // pixels // part for side, part in zip(camera.shape[3:], kernel, strict=True))
    out = camera.new_empty(len(camera), adapter.conv.out_channels, camera.shape[2], rows, columns)
    # More frames than elsewhere, because the convolutions' weights are streamed for each chunk.
    step = max(1, 2 * _TOKENS // (rows * columns))
    for start in range(0, camera.shape[2], step):
        chunk = slice(start, start + step)
        out[:, :, chunk] = type(adapter).forward(adapter, camera[:, :, chunk])
    return out


def _head(head: wan.Head, x: Tensor, e: Tensor) -> Tensor:
    """Return the output of the head, (batch, tokens, elements of a latent patch), in the dtype of `x`.

    Args:
        x: (batch, tokens, dim).
        e: modulation vectors of the time step, (batch, dim) or (batch, 1 or frames, dim).
    """
    modulation = Modulation.from_module(head, (e.unsqueeze(1) if e.ndim < 3 else e).unsqueeze(2), x)
    project, out = projection(head.head, x), x.new_empty(*x.shape[:2], head.head.out_features)
    for chunk in chunks(x.shape[1], _TOKENS):
        out[:, chunk] = project(modulation.shift_and_scale(head.norm(x[:, chunk]), 0, chunk))
    return out
