"""Names, shapes and roles of a Wan transformer's tensors, without a checkpoint.

This file imports nothing from the package, so that tools can load it by its path.
"""

from __future__ import annotations

import re
from typing import NamedTuple

Shape = tuple[int, ...]


class WanSize(NamedTuple):
    """The sizes in which Wan transformers differ."""

    dim: int
    ffn_dim: int
    layers: int
    in_dim: int = 16
    out_dim: int = 16
    image: bool = False
    """True for Wan 2.1 image-to-video, which has a second cross attention on CLIP vision features."""
    vace_layers: int = 0
    """The number of VACE blocks, which process control videos."""


SIZES = {
    "1.3B": WanSize(1536, 8960, 30),
    "5B": WanSize(3072, 14336, 30, in_dim=48, out_dim=48),
    "14B": WanSize(5120, 13824, 40),
    "I2V-14B": WanSize(5120, 13824, 40, in_dim=36, image=True),
}
"""Wan 2.1 T2V 1.3B and 14B (also each Wan 2.2 A14B expert), Wan 2.2 TI2V 5B, Wan 2.1 I2V 14B."""

VACE_14B = SIZES["14B"]._replace(vace_layers=8)

_TEXT_DIM, _TIME_DIM, _IMAGE_DIM, _CONTROL_DIM = 4096, 256, 1280, 96

_ROLES = (
    ("self_attn", r"blocks\.\d{1,9}\.self_attn\.[qkvo]\.weight"),
    ("cross_attn", r"blocks\.\d{1,9}\.cross_attn\.([qkvo]|[kv]_img)\.weight"),
    ("ffn", r"blocks\.\d{1,9}\.ffn\.\d{1,9}\.weight"),
    ("embedding", r"(^|\.)\w+_(embedding|projection|emb)\w*\."),
    ("head", r"^head\."),
)


def pixels_per_cell(channels: int) -> int:
    """Return the pixels per side of a latent cell; the latents of Wan 2.2's VAE have 48 channels, Wan 2.1's have 16."""
    return 16 if channels == 48 else 8


def wan_shapes(size: str) -> dict[str, Shape]:
    """Return the tensor shapes of a published Wan transformer; `size` is a key of `SIZES`."""
    return transformer_shapes(SIZES[size])


def transformer_shapes(size: WanSize) -> dict[str, Shape]:
    """Return the shape of each tensor by its name, without prefix and in the order of the model.

    Source: comfy/ldm/wan/model.py WanModel, ComfyUI 0.30.0.
    """
    dim = size.dim
    shapes: dict[str, Shape] = {"patch_embedding.weight": (dim, size.in_dim, 1, 2, 2), "patch_embedding.bias": (dim,)}
    shapes |= _linear("text_embedding.0", _TEXT_DIM, dim) | _linear("text_embedding.2", dim, dim)
    shapes |= _linear("time_embedding.0", _TIME_DIM, dim) | _linear("time_embedding.2", dim, dim)
    shapes |= _linear("time_projection.1", dim, 6 * dim)
    for layer in range(size.layers):
        shapes |= _block(f"blocks.{layer}", size)
    shapes |= {"head.modulation": (1, 2, dim)} | _linear("head.head", dim, 4 * size.out_dim)
    if size.image:
        shapes |= _norm("img_emb.proj.0", _IMAGE_DIM) | _linear("img_emb.proj.1", _IMAGE_DIM, _IMAGE_DIM)
        shapes |= _linear("img_emb.proj.3", _IMAGE_DIM, dim) | _norm("img_emb.proj.4", dim)
    for layer in range(size.vace_layers):
        shapes |= _block(f"vace_blocks.{layer}", size) | _linear(f"vace_blocks.{layer}.after_proj", dim, dim)
    if size.vace_layers:
        shapes |= _linear("vace_blocks.0.before_proj", dim, dim)
        shapes |= {"vace_patch_embedding.weight": (dim, _CONTROL_DIM, 1, 2, 2), "vace_patch_embedding.bias": (dim,)}
    return shapes


def role(name: str) -> str:
    """Return the role of a tensor: self_attn, cross_attn, ffn, embedding, head or other (norms, biases, adapters)."""
    return next((role for role, pattern in _ROLES if re.search(pattern, name)), "other")


def _block(prefix: str, size: WanSize) -> dict[str, Shape]:
    dim = size.dim
    shapes: dict[str, Shape] = {f"{prefix}.modulation": (1, 6, dim)} | _norm(f"{prefix}.norm3", dim)
    for attention, image in ((f"{prefix}.self_attn", False), (f"{prefix}.cross_attn", size.image)):
        for projection in ("q", "k", "v", "o", *(("k_img", "v_img") if image else ())):
            shapes |= _linear(f"{attention}.{projection}", dim, dim)
        for norm in ("norm_q", "norm_k", *(("norm_k_img",) if image else ())):
            shapes[f"{attention}.{norm}.weight"] = (dim,)
    return shapes | _linear(f"{prefix}.ffn.0", dim, size.ffn_dim) | _linear(f"{prefix}.ffn.2", size.ffn_dim, dim)


def _linear(name: str, in_features: int, out_features: int) -> dict[str, Shape]:
    return {f"{name}.weight": (out_features, in_features), f"{name}.bias": (out_features,)}


def _norm(name: str, dim: int) -> dict[str, Shape]:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}
