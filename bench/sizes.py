"""Predicted file size of every recipe for the published Wan models: the README's table."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch

from ..quant.gguf.layout import TensorSpec
from ..quant.plan.recipe import RECIPES, Recipe, plan_types
from ..quant.plan.wan_shapes import SIZES, WanSize, transformer_shapes, wan_shapes
from . import harness


class Source(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16


def rows() -> list[dict[str, object]]:
    """Return the GiB of every model, and the bits per weight of 14B, for every recipe."""
    return [
        {"recipe": recipe.name, "bits_per_weight": bits("14B", recipe)} | gib_by_model(recipe)
        for recipe in RECIPES.values()
    ]


def tensor_specs(size: WanSize, recipe: Recipe) -> list[TensorSpec]:
    """Return the tensors of a file in this recipe, whose source is in bfloat16."""
    shapes = transformer_shapes(size)
    types = plan_types(recipe, {name: Source(shape) for name, shape in shapes.items()}).types
    return [TensorSpec(name, types[name], shape) for name, shape in shapes.items()]


def tensor_bytes(size: str, recipe: Recipe) -> int:
    return sum(spec.nbytes for spec in tensor_specs(SIZES[size], recipe))


def gib_by_model(recipe: Recipe) -> dict[str, object]:
    return {size: round(tensor_bytes(size, recipe) / harness.GIB, 2) for size in SIZES}


def bits(size: str, recipe: Recipe) -> float:
    return round(8 * tensor_bytes(size, recipe) / sum(map(prod, wan_shapes(size).values())), 2)


def main() -> None:
    options = harness.arguments(__doc__).parse_args()
    head = ("recipe", "bits per weight", *(f"{size} GiB" for size in SIZES))
    found = rows()
    harness.conclude(options, found, harness.table(head, [list(row.values()) for row in found]))


if __name__ == "__main__":
    main()
