"""Predicted file size of every recipe for the published Wan models: the README's table."""

from __future__ import annotations

import argparse
import json
from math import prod
from typing import NamedTuple

import torch

from ..quant.gguf.layout import TensorSpec
from ..quant.plan.recipe import RECIPES, Recipe, plan
from ..quant.plan.wan_shapes import SIZES, wan_shapes


class Source(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16


def rows() -> list[dict[str, object]]:
    """GiB by model and bits per weight of the 14B for every recipe."""
    return [
        {"recipe": recipe.name, "bits_per_weight": bits("14B", recipe)} | gib_by_model(recipe)
        for recipe in RECIPES.values()
    ]


def tensor_bytes(size: str, recipe: Recipe) -> int:
    shapes = wan_shapes(size)
    types = plan(recipe, {name: Source(shape) for name, shape in shapes.items()}).types
    return sum(TensorSpec(name, types[name], shape).nbytes for name, shape in shapes.items())


def gib_by_model(recipe: Recipe) -> dict[str, object]:
    return {size: round(tensor_bytes(size, recipe) / 2**30, 2) for size in SIZES}


def bits(size: str, recipe: Recipe) -> float:
    return round(8 * tensor_bytes(size, recipe) / sum(map(prod, wan_shapes(size).values())), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    if parser.parse_args().json:
        print(json.dumps(rows(), indent=2))
        return
    print("| recipe | bits per weight | " + " | ".join(f"{size} GiB" for size in SIZES) + " |")
    print("|---" * (len(SIZES) + 2) + "|")
    for row in rows():
        print(f"| {row['recipe']} | {row['bits_per_weight']} | " + " | ".join(str(row[size]) for size in SIZES) + " |")


if __name__ == "__main__":
    main()
