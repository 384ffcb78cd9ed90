"""Error of each recipe on TinyWan: the same seeds unquantized and quantized, by ggml's or ComfyUI's encoders and ours.

One rounding of one network is subject to chance. So several equal networks that differ in the order of their channels
are quantized, each by all methods and with its own seeds, and the methods are compared file by file.

ComfyUI's own formats also quantize the inputs of layers, on a GPU that multiplies in the format. Steps and clips count
that: it is simulated exactly (bench/tinywan/activations.py), since a CPU does it for some formats only. GGUF's inputs
stay as they are. The column "layers" counts the weights alone.

All encoders of ComfyUI need the newest comfy-kitchen. On a machine with 16 cores, interrupted and continued at will:

    OMP_NUM_THREADS=1 python3 dev.py bench --host 0.30.0+newest quality --jobs 16 --parts out/quality --update

`--parts` keeps the errors of each file in a folder. A run takes from there what is measured, also by runs for single
networks and recipes, such as `--first 3 --roundings 1 --recipes INT8`. Delete it when encoders have changed. `--update`
replaces the committed rows of the measured recipes and methods, and keeps the others.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from wanquant.bench import harness
from wanquant.bench.comparison import Gain, Spread
from wanquant.bench.tinywan.encodings import METHODS, NATIVE_METHODS, methods_of, unavailable
from wanquant.bench.tinywan.jobs import Bench, Sample
from wanquant.bench.tinywan.pictures import draw_quality
from wanquant.bench.tinywan.reference import gains, origin
from wanquant.quant.plan.recipe import GGUF_RECIPES, RECIPES

GGUF = tuple(name for name, recipe in GGUF_RECIPES.items() if recipe.base not in ("F16", "BF16"))
NATIVE = ("MXFP8", "INT8", "FP8", "W6A8", "W4A8", "NVFP4", "INT4")
ALL_METHODS = tuple(dict.fromkeys(("kitchen", *METHODS, *NATIVE_METHODS)))
PEERS = {
    "plain": "ggml",
    "int8": "plain",
    "importance": "ggml + importance",
    "importance + LoRA": "importance",
    "calibrated": "ggml + importance",
    "thorough": "calibrated",
    "narrow": "ggml + importance",
}
"""The method that each method is compared with: ggml's encoders with the same statistics, or what it changes."""
NATIVE_PEERS = {"plain": "kitchen", "calibrated": "kitchen"}
"""The same for ComfyUI's own formats, which kitchen encodes without statistics."""


@dataclass(frozen=True)
class Quality:
    """The files of a recipe by one method: means over the networks, and for clips also the deviation over all seeds."""

    recipe: str
    method: str
    networks: int
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
            networks=len(files),
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


def measure(
    recipes: Sequence[str],
    methods: Sequence[str],
    *,
    roundings: int,
    clips: int,
    captions: int,
    first: int = 0,
    jobs: int = 1,
    parts: Path | None = None,
) -> list[Quality]:
    """Return the errors of every recipe by every method that makes such files and is available.

    The methods that these are compared with are measured as well.

    Args:
        roundings: the number of networks.
        clips: per network.
        captions: that the statistics are collected from.
        first: the first network.
        jobs: the number of processes.
        parts: a folder where the errors of each file are kept, and taken from.
    """
    wanted = [(recipe, method) for recipe in recipes for method in methods if method in methods_of(recipe)]
    peers = [(recipe, other) for recipe, method in wanted if (other := peer(recipe, method))]
    missing = {file: reason for file in (*wanted, *peers) if (reason := unavailable(*file))}
    for reason in missing.values():
        print(reason, file=sys.stderr)
    files = [file for file in dict.fromkeys((*wanted, *peers)) if file not in missing]
    networks = range(first, first + roundings)
    samples = Bench(clips, captions, parts).measure([(order, *file) for order in networks for file in files], jobs)
    found = {file: [samples[(order, *file)] for order in networks] for file in files}
    return [
        Quality.of(recipe, method, found[recipe, method], found.get((recipe, peer(recipe, method) or "")))
        for recipe, method in wanted
        if (recipe, method) in found
    ]


def merged(before: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result with the rows of one before that it does not replace, in the order of recipes and methods.

    Raises:
        SystemExit: the two have other settings.
    """
    for key in before.keys() - {"machine", "rows"}:
        if before[key] != result[key]:
            raise SystemExit(f"the committed rows have {key} {before[key]}, got {result[key]}: measure all rows anew")
    rows = {(row["recipe"], row["method"]): row for row in (*before["rows"], *result["rows"])}
    order = product((*GGUF, *NATIVE), ALL_METHODS)
    machines = dict.fromkeys(f"{before['machine']}; {result['machine']}".split("; "))
    return {**result, "machine": "; ".join(machines), "rows": [rows[key] for key in order if key in rows]}


def peer(recipe: str, method: str) -> str | None:
    """Return the method that a method is compared with for a recipe, or None."""
    return (NATIVE_PEERS if RECIPES[recipe].is_native else PEERS).get(method)


def text(rows: Sequence[Quality]) -> str:
    measures = ("layers", "velocity", "latent", "motion")
    head = ("recipe", "method", "MB", "weights", *measures, "colour right", "motion right")
    compared = [
        (row.recipe, row.method, peer(row.recipe, row.method), *(str(row.gains[key]) for key in measures))
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
    parser.add_argument("--recipes", nargs="+", default=(*GGUF, *NATIVE), choices=RECIPES, metavar="RECIPE")
    parser.add_argument("--methods", nargs="+", default=ALL_METHODS, choices=ALL_METHODS)
    parser.add_argument("--roundings", type=int, default=16, help="networks; the first is the unchanged TinyWan")
    parser.add_argument("--first", type=int, default=0, help="the first of the networks")
    parser.add_argument("--seeds", type=int, default=1, help="clips per network")
    parser.add_argument("--prompts", type=int, default=8, help="captions that the statistics are collected from")
    parser.add_argument("--jobs", type=int, default=1, help="processes that measure at the same time")
    parser.add_argument("--parts", type=Path, metavar="FOLDER", help="keep the errors of files, and go on from them")
    options = parser.parse_args()
    given = {"roundings": options.roundings, "clips": options.seeds, "captions": options.prompts}
    how = {"first": options.first, "jobs": options.jobs, "parts": options.parts}
    rows = measure(options.recipes, options.methods, **given, **how)
    del given["roundings"]
    result = {**origin(), **given, "rows": [asdict(row) for row in rows]}
    if options.update:
        result = merged(json.loads(options.update.read_text()), result)
        draw_quality(result["rows"], harness.PICTURES / "quality.png")
    harness.conclude(options, result, text(rows))


if __name__ == "__main__":
    main()
