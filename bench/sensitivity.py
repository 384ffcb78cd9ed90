"""Sensitivity of TinyWan's layers to quantization, by noise level, and what a choice of types gains from it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch
from torch import Tensor

from wanquant.bench import harness
from wanquant.bench.comparison import Gain, Spread
from wanquant.bench.tinywan.allocation import HALVES, Allocator, Network, Split, half_of
from wanquant.bench.tinywan.data import noise_level
from wanquant.bench.tinywan.pictures import draw_sensitivity
from wanquant.bench.tinywan.reference import STEPS, Reference, gains, load_model, load_weights, origin
from wanquant.quant import QTYPES
from wanquant.quant.conversion.layer_encoder import LayerEncoder

# Coarse enough to exceed all other rounding, fine enough that the errors of layers add up.
PROBE = "Q3_K"
_CLIPS = 4
LEVELS = noise_level(torch.linspace(1, 0, STEPS + 1)).tolist()


@dataclass(frozen=True)
class Sensitivity:
    """The sensitivity of one layer: the error when it alone is quantized to `PROBE`."""

    name: str
    velocity_sqnr: tuple[float, ...]
    """SQNR of each step in dB."""

    def of_half(self, half: str) -> float:
        """Return the error of the steps of a half, each weighted by the square of the noise that it removes."""
        steps = zip(self.velocity_sqnr, pairwise(LEVELS), strict=True)
        return sum(10 ** (-db / 10) * (above - below) ** 2 for db, (above, below) in steps if half_of(above) == half)


@dataclass(frozen=True)
class Allocation:
    """The result of one way to choose types, at the bytes of a recipe."""

    recipe: str
    way: str
    latent_psnr: Spread
    motion_psnr: Spread
    gains: dict[str, Gain]
    """Gains over the previous way."""


def probe(names: Iterable[str], reference: Reference) -> tuple[list[Sensitivity], dict[str, Tensor]]:
    """Return the sensitivity of every layer, and the error of its weight."""
    weights, qtype, rows, errors = load_weights(), QTYPES[PROBE], [], {}
    for name in names:
        rounded = qtype.dequantize(LayerEncoder().quantize(qtype, weights[name]))
        rows.append(Sensitivity(name, tuple(reference.velocity_sqnr(load_model({**weights, name: rounded})))))
        errors[name] = rounded - weights[name]
    return rows, errors


def ways(allocator: Allocator, recipe: str, measured: Mapping[str, Mapping[str, float]]) -> dict[str, Split]:
    """Return the ways to choose types, each with more freedom than the one before."""
    return {
        "recipe": allocator.of_recipe(recipe),
        "target size": allocator.of_size(recipe),
        "and measured sensitivity": allocator.by_sensitivity(recipe, measured),
        "and a file for each half": allocator.by_half(recipe, measured),
        "and bytes shared by both": allocator.by_half(recipe, measured, shared=True),
    }


def compare(splits: Mapping[str, Mapping[str, Split]], roundings: int, clips: int, captions: int) -> list[Allocation]:
    """Compare all ways of all recipes on the same networks, each with its own clips."""
    found = defaultdict(list)
    for order in range(roundings):
        reference, network = Reference.sample(clips, order), Network.of(captions, order)
        for recipe, of_recipe in splits.items():
            for way, split in of_recipe.items():
                found[recipe, way].append(reference.errors(network.quantized(split)))
    return [
        Allocation(
            recipe,
            way,
            Spread.of([psnr for errors in found[recipe, way] for psnr in errors.latent_psnr]),
            Spread.of([psnr for errors in found[recipe, way] for psnr in errors.motion_psnr]),
            gains(found[recipe, way], found[recipe, before]) if before else {},
        )
        for recipe, of_recipe in splits.items()
        for before, way in pairwise((None, *of_recipe))
    ]


def text(rows: Sequence[Allocation]) -> str:
    compared = ("velocity", "latent", "motion")
    cells = [
        [
            row.recipe,
            row.way,
            str(row.latent_psnr),
            str(row.motion_psnr),
            *(str(row.gains.get(k, "")) for k in compared),
        ]
        for row in rows
    ]
    return harness.table(
        ("bytes of", "types chosen by", "latent", "motion", *(f"{key} gained" for key in compared)), cells
    )


def main() -> None:
    parser = harness.arguments(__doc__, update=harness.RESULTS / "sensitivity.json")
    parser.add_argument("--recipes", nargs="+", default=["Q4_K_M", "Q3_K_M", "Q2_K"])
    parser.add_argument("--roundings", type=int, default=8, help="networks; the first is the unchanged TinyWan")
    parser.add_argument("--seeds", type=int, default=2, help="clips per network")
    parser.add_argument(
        "--prompts", type=int, default=8, help="captions that the importance matrices are collected from"
    )
    options = parser.parse_args()
    allocator = Allocator.of(Network.of(options.prompts))
    # These clips are not used for the comparison below.
    rows, errors = probe(allocator.fronts["all"], Reference.sample(_CLIPS, options.roundings))
    measured = {row.name: {half: row.of_half(half) for half in HALVES} for row in rows}
    splits = {recipe: ways(allocator.with_errors(errors), recipe, measured) for recipe in options.recipes}
    given = {"roundings": options.roundings, "clips": options.seeds, "captions": options.prompts}
    allocations = compare(splits, **given)
    result = {
        **origin(),
        **{**given, "probe": PROBE, "levels": LEVELS[:-1]},
        "layers": [asdict(row) for row in rows],
        "allocations": [asdict(row) for row in allocations],
    }
    if options.update:
        draw_sensitivity(result["layers"], LEVELS[:-1], harness.PICTURES / "sensitivity.png")
    harness.conclude(options, result, text(allocations))


if __name__ == "__main__":
    main()
