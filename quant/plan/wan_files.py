"""The tensors and the bytes of a published Wan model in a recipe, without a checkpoint."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from ..gguf.layout import TensorSpec
from .recipe import Recipe, plan_types
from .wan_shapes import Shape, WanSize, transformer_shapes


class Source(NamedTuple):
    """A tensor of a published checkpoint."""

    shape: Shape
    dtype: torch.dtype = torch.bfloat16


def tensor_specs(size: WanSize, recipe: Recipe) -> list[TensorSpec]:
    """Return the tensors of a file in this recipe, whose source is in bfloat16."""
    shapes = transformer_shapes(size)
    types = plan_types(recipe, {name: Source(shape) for name, shape in shapes.items()}).types
    # A LayerType has all that a TensorSpec asks its type for.
    return [TensorSpec(name, types[name], shape) for name, shape in shapes.items()]  # type: ignore[arg-type]


@lru_cache(maxsize=256)
def tensor_bytes(size: WanSize, recipe: Recipe) -> int:
    """Return the bytes of these tensors, which are nearly all of the file."""
    return sum(spec.nbytes for spec in tensor_specs(size, recipe))
