"""What tuning each block through its rounding adds to a calibration, on TinyWan; see docs/tuning.md."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from wanquant.bench.convert import machine
from wanquant.bench.tinywan.encodings import Workshop
from wanquant.bench.tinywan.reference import Errors, Reference, load_model, prompts
from wanquant.bench.tinywan.results import add_options, checkpoint, table, write_results
from wanquant.bench.tinywan.tuning import tune
from wanquant.quant import open_gguf

METHODS = ("plain", "importance", "calibrated", "tuned")


@dataclass(frozen=True)
class Row(Errors):
    """One way to make a file of a recipe; all take the same bytes."""

    recipe: str
    method: str


def measure(recipes: Sequence[str], *, clips: int, captions: int, steps: int) -> list[Row]:
    """All methods; tuning begins with the calibrated weights."""
    reference, known, rows = Reference.sample(clips), prompts(captions), []
    with Workshop.open(known) as workshop:
        for recipe in recipes:
            files = [workshop.plain(recipe), workshop.weighted(recipe), workshop.calibrated(recipe)]
            start, tensors = files[-1].weights, open_gguf(workshop.path(recipe, workshop.calibration)).tensors
            types = {name: tensors[name].qtype for name in files[-1].quantized}
            tuned = tune(workshop.source, start, types, workshop.calibration, known, steps)
            for method, weights in zip(METHODS, [*(file.weights for file in files), tuned], strict=True):
                rows.append(Row(**vars(reference.errors(load_model(weights))), recipe=recipe, method=method))
    return rows


def text(rows: Sequence[Row]) -> str:
    cells = []
    for row in rows:
        velocity = sum(row.velocity_sqnr) / len(row.velocity_sqnr)
        latent, motion = (f"{x.mean:.1f} ± {x.deviation:.1f}" for x in (row.latent_psnr, row.motion_psnr))
        cells.append([row.recipe, row.method, f"{velocity:.1f}", latent, motion])
    return table(("recipe", "method", "velocity", "latent", "motion"), cells)


def main() -> None:
    parser = argparse.ArgumentParser(prog="dev.py bench tuning", description=__doc__)
    parser.add_argument("--recipes", nargs="+", default=("Q2_K", "Q3_K_M", "Q4_K_M"))
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=8, help="captions to calibrate and to tune with")
    parser.add_argument("--steps", type=int, default=128, help="of tuning, for each block")
    add_options(parser)
    options = parser.parse_args()
    rows = measure(options.recipes, clips=options.seeds, captions=options.prompts, steps=options.steps)
    settings = {"seeds": options.seeds, "prompts": options.prompts, "steps": options.steps}
    result = {"machine": machine(), "checkpoint": checkpoint(), **settings, "rows": [asdict(row) for row in rows]}
    if options.update:
        write_results("tuning", result)
    print(json.dumps(result, indent=2) if options.json else text(rows))


if __name__ == "__main__":
    main()
