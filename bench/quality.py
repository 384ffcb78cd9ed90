"""Error of each recipe on TinyWan: the same seeds unquantized and quantized, by ggml's encoders and by ours.

One rounding of one network is subject to chance. So several equal networks that differ in the order of their channels
are quantized, each by all methods and with its own seeds, and the methods are compared file by file.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from statistics import fmean

from wanquant.bench import harness
from wanquant.bench.comparison import Gain, Spread
from wanquant.bench.tinywan.encodings import METHODS, Workshop
from wanquant.bench.tinywan.pictures import draw_quality
from wanquant.bench.tinywan.reference import Errors, Reference, gains, load_model, origin, prompts

RECIPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")
PEERS = {
    "plain": "ggml",
    "importance": "ggml + importance",
    "importance + LoRA": "importance",
    "calibrated": "ggml + importance",
    "thorough": "calibrated",
}
"""The method that each method is compared with: ggml's encoders with the same statistics, or the method it extends."""


@dataclass(frozen=True)
class Sample(Errors):
    """The errors of one file."""

    nbytes: int
    weight_sqnr: float
    """SQNR of all quantized weights, in dB."""
    output_sqnr: float
    """SQNR in dB of the outputs of the quantized layers, averaged, for the inputs in the unquantized model."""

    @property
    def means(self) -> dict[str, float]:
        return {"layers": self.output_sqnr, **super().means}


@dataclass(frozen=True)
class Quality:
    """The files of a recipe by one method: means over the networks, and for clips also the deviation over all seeds."""

    recipe: str
    method: str
    nbytes: int
    weight_sqnr: float
    output_sqnr: float
    velocity_sqnr: tuple[float, ...]
    latent_psnr: Spread
    motion_psnr: Spread
    colour: float
    motion: float
    gains: dict[str, Gain]
    """Gains over the peer; empty if it was not measured."""

    @classmethod
    def of(cls, recipe: str, method: str, files: Sequence[Sample], peers: Sequence[Sample] | None) -> Quality:
        return cls(
            recipe=recipe,
            method=method,
            nbytes=files[0].nbytes,
            weight_sqnr=fmean(file.weight_sqnr for file in files),
            output_sqnr=fmean(file.output_sqnr for file in files),
            velocity_sqnr=tuple(map(fmean, zip(*(file.velocity_sqnr for file in files), strict=True))),
            latent_psnr=Spread.of([psnr for file in files for psnr in file.latent_psnr]),
            motion_psnr=Spread.of([psnr for file in files for psnr in file.motion_psnr]),
            colour=fmean(file.colour for file in files),
            motion=fmean(file.motion for file in files),
            gains=gains(files, peers) if peers else {},
        )


Files = dict[tuple[str, str], Sample]
"""The files of one network, by recipe and method."""


def measure(
    recipes: Sequence[str], methods: Sequence[str], *, roundings: int, clips: int, captions: int, jobs: int = 1
) -> list[Quality]:
    """Measure every recipe by every method.

    Args:
        roundings: the number of networks.
        clips: per network.
        captions: that the statistics are collected from.
        jobs: the number of networks that are measured at the same time, each in a process.
    """
    of_network = partial(measure_network, recipes=recipes, methods=methods, clips=clips, captions=captions)
    if jobs == 1:
        networks = list(map(of_network, range(roundings)))
    else:
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
            networks = list(pool.map(of_network, range(roundings)))
    files = {key: [network[key] for network in networks] for key in product(recipes, methods)}
    return [
        Quality.of(recipe, method, found, files.get((recipe, PEERS.get(method, ""))))
        for (recipe, method), found in files.items()
    ]


def measure_network(order: int, *, recipes: Sequence[str], methods: Sequence[str], clips: int, captions: int) -> Files:
    """Measure every recipe by every method on the network whose channels have this order."""
    reference, files = Reference.sample(clips, order), {}
    with Workshop.open(prompts(captions), order) as workshop:
        products = reference.products(workshop.source)
        for recipe, method in product(recipes, methods):
            file = METHODS[method](workshop, recipe)
            files[recipe, method] = Sample(
                **vars(reference.errors(load_model(file.weights))),
                nbytes=file.nbytes,
                weight_sqnr=file.weight_sqnr(workshop.source),
                output_sqnr=file.output_sqnr(workshop.source, products),
            )
    return files


def text(rows: Sequence[Quality]) -> str:
    measures = ("layers", "velocity", "latent", "motion")
    head = ("recipe", "method", "MB", "weights", *measures, "colour right", "motion right")
    compared = [
        (row.recipe, row.method, PEERS[row.method], *(str(row.gains[key]) for key in measures))
        for row in rows
        if row.gains
    ]
    gained = harness.table(("recipe", "gain of", "over", *measures), compared)
    return f"{harness.table(head, [_cells(row) for row in rows])}\n\n{gained}"


def _cells(row: Quality) -> list[str]:
    return [
        row.recipe,
        row.method,
        f"{row.nbytes / 1e6:.2f}",
        f"{row.weight_sqnr:.1f}",
        f"{row.output_sqnr:.1f}",
        f"{fmean(row.velocity_sqnr):.1f}",
        *(str(row.latent_psnr), str(row.motion_psnr)),
        *(f"{row.colour:.0%}", f"{row.motion:.0%}"),
    ]


def main() -> None:
    parser = harness.arguments(__doc__, update=harness.RESULTS / "quality.json")
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--roundings", type=int, default=16, help="networks; the first is the unchanged TinyWan")
    parser.add_argument("--seeds", type=int, default=1, help="clips per network")
    parser.add_argument("--prompts", type=int, default=8, help="captions that the statistics are collected from")
    parser.add_argument("--jobs", type=int, default=1, help="networks that are measured at the same time")
    options = parser.parse_args()
    given = {"roundings": options.roundings, "clips": options.seeds, "captions": options.prompts}
    rows = measure(options.recipes, options.methods, **given, jobs=options.jobs)
    result = {**origin(), **given, "rows": [asdict(row) for row in rows]}
    if options.update:
        draw_quality(result["rows"], harness.PICTURES / "quality.png")
    harness.conclude(options, result, text(rows))


if __name__ == "__main__":
    main()
