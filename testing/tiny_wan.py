"""Random Wan checkpoints in safetensors, with the true tensor names: tiny for tests and demo, large for benchmarks."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Container, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..quant.check.tiny_wan import random_tensor
from ..quant.plan.wan_shapes import WanSize, transformer_shapes

_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_tiny_wan(
    path: str | Path,
    *,
    dim: int = 256,
    ffn_dim: int = 1024,
    layers: int = 4,
    variant: str = "t2v",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    prefix: str = "",
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a Wan 2.1 checkpoint and return its path.

    Args:
        dim: a multiple of 128, the head size.
        variant: "t2v" or "i2v".
        metadata: the safetensors `__metadata__`.
    """
    size = {"t2v": WanSize(dim, ffn_dim, layers), "i2v": WanSize(dim, ffn_dim, layers, 36, 16, True)}
    shapes = {prefix + name: shape for name, shape in transformer_shapes(size[variant]).items()}
    return write_random_checkpoint(path, shapes, dtype=dtype, seed=seed, metadata=metadata)


def completed(tensors: Mapping[str, Tensor], layers: int = 1) -> dict[str, Tensor]:
    """Return the tensors, and one element for each other tensor that a Wan 2.1 of `layers` blocks must have."""
    names = transformer_shapes(WanSize(8, 8, layers))
    return {name: torch.ones(1) for name in names} | dict(tensors)


def vace_add_on(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a VACE add-on of one block for a checkpoint, with the values of its first block."""
    block = {f"vace_{name}": tensor.clone() for name, tensor in state.items() if name.startswith("blocks.0.")}
    square, bias = state["blocks.0.self_attn.q.weight"], state["blocks.0.self_attn.q.bias"]
    for layer in ("before_proj", "after_proj"):
        block |= {f"vace_blocks.0.{layer}.weight": square.clone(), f"vace_blocks.0.{layer}.bias": bias.clone()}
    embedding = torch.ones(len(bias), 96, 1, 2, 2, dtype=bias.dtype)
    return block | {"vace_patch_embedding.weight": embedding, "vace_patch_embedding.bias": bias.clone()}


def write_random_checkpoint(
    path: str | Path,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    metadata: Mapping[str, str] | None = None,
    draw: Callable[[str, tuple[int, ...], torch.Generator], Tensor] | None = None,
) -> Path:
    """Write tensors one at a time, so that memory does not grow with the file, and return the path.

    Args:
        draw: the function that draws the values (default: `random_tensor`).
    """
    header, _ = _header(shapes, dtype, metadata)
    generator = torch.Generator().manual_seed(seed)
    with open(path, "wb") as file:
        file.write(header)
        for name, shape in shapes.items():
            tensor = (draw or random_tensor)(name, shape, generator).to(dtype)
            file.write(tensor.flatten().view(torch.uint8).numpy().data)
    return Path(path)


def write_sparse_checkpoint(
    path: str | Path,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    drawn: Container[str] = (),
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write random values for the tensors in `drawn`, and zeros that need no disk space for the others."""
    header, _ = _header(shapes, dtype, None)
    generator = torch.Generator().manual_seed(0)
    with open(path, "wb") as file:
        file.write(header)
        for name, shape in shapes.items():
            if name in drawn:
                tensor = random_tensor(name, shape, generator).to(dtype)
                file.write(tensor.flatten().view(torch.uint8).numpy().data)
            else:
                file.seek(math.prod(shape) * dtype.itemsize, os.SEEK_CUR)
        file.truncate()
    return Path(path)


def _header(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, metadata: Mapping[str, str] | None
) -> tuple[bytes, int]:
    """Return the beginning of a safetensors file, and the number of bytes that follow it."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header, end
