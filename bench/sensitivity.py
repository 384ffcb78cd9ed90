"""Where bits matter in TinyWan, by block, role and noise level, and what a choice of types gains from knowing it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch
from torch import Tensor

from wanquant.bench.tinywan.allocation import HALVES, Allocator, Split, by_half, half_of
from wanquant.bench.tinywan.data import noise_level
from wanquant.bench.tinywan.pictures import draw_sensitivity
from wanquant.bench.tinywan.reference import STEPS, Errors, Reference, Spread, load_model, load_weights
from wanquant.bench.tinywan.results import PICTURES, add_options, conclude, origin, table
from wanquant.quant import QTYPES
from wanquant.quant.inputs import Inputs

# Coarse enough to stand out of all rounding, fine enough that errors still add up.
PROBE = "Q3_K"
LEVELS = noise_level(torch.linspace(1, 0, STEPS + 1)).tolist()


@dataclass(frozen=True)
class Sensitivity:
    """Of one layer, when it alone is quantized to `PROBE`."""

    name: str
    velocity_sqnr: tuple[float, ...]
    """dB, of every step."""

    def of_half(self, half: str) -> float:
        """How far the steps of a half lead away: each counts by the square of the noise that it takes away."""
        steps = zip(self.velocity_sqnr, pairwise(LEVELS), strict=True)
        return sum(10 ** (-db / 10) * (above - below) ** 2 for db, (above, below) in steps if half_of(above) == half)


@dataclass(frozen=True)
class Allocation(Errors):
    """The errors of one way to choose types, at the bytes of a recipe."""

    recipe: str
    way: str


def probe(names: Sequence[str], reference: Reference) -> tuple[list[Sensitivity], dict[str, Tensor]]:
    """Every layer's sensitivity, and the error that its weight had."""
    weights, qtype, rows, errors = load_weights(), QTYPES[PROBE], [], {}
    for name in names:
        decoded = qtype.dequantize(Inputs().quantize(qtype, weights[name]))
        rows.append(Sensitivity(name, tuple(reference.velocity_sqnr(load_model({**weights, name: decoded})))))
        errors[name] = decoded - weights[name]
    return rows, errors


def allocate(
    recipes: Sequence[str], reference: Reference, allocator: Allocator, measured: Mapping[str, Mapping[str, float]]
) -> list[Allocation]:
    """What each way comes to."""
    rows = []
    for recipe in recipes:
        ways: dict[str, Split] = {
            "recipe": allocator.of_recipe(recipe),
            "target size": allocator.of_size(recipe),
            "and measured sensitivity": allocator.by_sensitivity(recipe, measured),
            "and a file for each half": allocator.by_half(recipe, measured),
            "and bytes shared by both": allocator.by_half(recipe, measured, shared=True),
        }
        for way, split in ways.items():
            models = {half: load_model(weights) for half, weights in split.items()}
            rows.append(Allocation(**vars(reference.errors(by_half(models))), recipe=recipe, way=way))
    return rows


def text(rows: Sequence[Allocation]) -> str:
    """The table."""
    cells = [
        [row.recipe, row.way, *(str(Spread.of(clips)) for clips in (row.latent_psnr, row.motion_psnr))] for row in rows
    ]
    return table(("bytes of", "types chosen by", "latent", "motion"), cells)


def main() -> None:
    parser = argparse.ArgumentParser(prog="dev.py bench sensitivity", description=__doc__)
    # In four blocks a target size raises every type by one: it cannot be Q2_K's.
    parser.add_argument("--recipes", nargs="+", default=["Q4_K_M", "Q3_K_M"])
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=8, help="captions that importance matrices are made of")
    add_options(parser)
    options = parser.parse_args()
    reference, allocator = Reference.sample(options.seeds), Allocator.of(options.prompts)
    rows, errors = probe(allocator.names, reference)
    measured = {row.name: {half: row.of_half(half) for half in HALVES} for row in rows}
    allocations = allocate(options.recipes, reference, allocator.told(errors), measured)
    result = {
        **origin(),
        **{"seeds": options.seeds, "prompts": options.prompts, "probe": PROBE, "levels": LEVELS[:-1]},
        "layers": [asdict(row) for row in rows],
        "allocations": [asdict(row) for row in allocations],
    }
    if options.update:
        draw_sensitivity(result["layers"], LEVELS[:-1], PICTURES / "sensitivity.png")
    conclude(options, "sensitivity", result, text(allocations))


if __name__ == "__main__":
    main()
