"""Predicted file size of every recipe for the published Wan models: the table of docs/formats.md."""

from __future__ import annotations

from math import prod

from ..quant.plan.recipe import RECIPES, Recipe
from ..quant.plan.wan_files import tensor_bytes
from ..quant.plan.wan_shapes import SIZES, wan_shapes
from . import harness


def rows() -> list[dict[str, object]]:
    """Return the GiB of every model, and the bits per weight of 14B, for every recipe."""
    return [
        {"recipe": recipe.name, "bits_per_weight": bits("14B", recipe)} | gib_by_model(recipe)
        for recipe in RECIPES.values()
    ]


def gib_by_model(recipe: Recipe) -> dict[str, object]:
    return {name: round(tensor_bytes(size, recipe) / harness.GIB, 2) for name, size in SIZES.items()}


def bits(size: str, recipe: Recipe) -> float:
    return round(8 * tensor_bytes(SIZES[size], recipe) / sum(map(prod, wan_shapes(size).values())), 2)


def main() -> None:
    options = harness.arguments(__doc__).parse_args()
    head = ("recipe", "bits per weight", *(f"{size} GiB" for size in SIZES))
    found = rows()
    harness.conclude(options, found, harness.table(head, [list(row.values()) for row in found]))


if __name__ == "__main__":
    main()
