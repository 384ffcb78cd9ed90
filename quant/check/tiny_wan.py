"""A tiny Wan with random weights, of the true structure, in a file of 8 MB."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from ..files.atomic_file import AtomicFile
from ..files.safetensors_content import SafetensorsContent, StreamedTensor
from ..plan.wan_shapes import WanSize, transformer_shapes

SIZE = WanSize(dim=256, ffn_dim=512, layers=2)


def write_random_wan(path: Path, seed: int = 0) -> Path:
    """Write a Wan 2.1 text-to-video checkpoint in bfloat16 and return its path; a seed always gives the same file.

    Raises:
        QuantError: the file exists or cannot be written.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: random_tensor(name, shape, generator) for name, shape in transformer_shapes(SIZE).items()}
    tensors = (StreamedTensor.whole(name, tensor.bfloat16()) for name, tensor in drawn.items())
    content = SafetensorsContent(tensors, {})
    with AtomicFile(path, content.nbytes) as file:
        content.write(file)
        return file.commit()


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw values at the usual scale, float32 of this shape.

    The scale is 1/sqrt(fan-in) for weights and 1/sqrt(dim) for modulation; the weights of norms are 1.
    """
    if len(shape) == 1:
        return torch.ones(shape) if name.endswith(".weight") else 0.02 * torch.randn(shape, generator=generator)
    fan_in = math.prod(shape[1:]) if name.endswith(".weight") else shape[-1]
    return torch.randn(shape, generator=generator).mul_(fan_in**-0.5)
