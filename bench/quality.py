"""What each recipe costs TinyWan: the same seeds unquantized and quantized, by ggml's encoders and in our ways."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from wanquant.bench.tinywan.encodings import METHODS, Workshop
from wanquant.bench.tinywan.pictures import draw_quality
from wanquant.bench.tinywan.reference import Errors, Reference, load_model, prompts
from wanquant.bench.tinywan.results import PICTURES, add_options, conclude, origin, table

RECIPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")


@dataclass(frozen=True)
class Quality(Errors):
    """One file."""

    recipe: str
    method: str
    nbytes: int
    weight_sqnr: float
    """Of all quantized weights, in dB."""
    output_sqnr: float
    """Of the mean quantized layer's outputs, in dB, for the inputs that it has unquantized."""


def measure(recipes: Sequence[str], methods: Sequence[str], clips: int, captions: int) -> list[Quality]:
    """Every recipe by every method, the importance matrix being of so many captions."""
    reference = Reference.sample(clips)
    products, rows = reference.products(), []
    with Workshop.open(prompts(captions)) as workshop:
        for recipe in recipes:
            for method in methods:
                file = METHODS[method](workshop, recipe)
                errors = reference.errors(load_model(file.weights))
                rows.append(
                    Quality(
                        **vars(errors),
                        recipe=recipe,
                        method=method,
                        nbytes=file.nbytes,
                        weight_sqnr=file.weight_sqnr(workshop.source),
                        output_sqnr=file.output_sqnr(workshop.source, products),
                    )
                )
    return rows


def text(rows: Sequence[Quality]) -> str:
    """The table."""
    head = (
        "recipe",
        "method",
        "MB",
        "weights",
        "layers",
        "velocity",
        "latent",
        "motion",
        "colour right",
        "motion right",
    )
    return table(head, [_cells(row) for row in rows])


def _cells(row: Quality) -> list[str]:
    latent, motion = (f"{x.mean:.1f} ± {x.deviation:.1f}" for x in (row.latent_psnr, row.motion_psnr))
    velocity = sum(row.velocity_sqnr) / len(row.velocity_sqnr)
    shares = (f"{row.colour:.0%}", f"{row.motion:.0%}")
    return [
        row.recipe,
        row.method,
        f"{row.nbytes / 1e6:.2f}",
        f"{row.weight_sqnr:.1f}",
        f"{row.output_sqnr:.1f}",
        f"{velocity:.1f}",
        latent,
        motion,
        *shares,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="dev.py bench quality", description=__doc__)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=8, help="captions that the importance matrix is made of")
    add_options(parser)
    options = parser.parse_args()
    rows = measure(options.recipes, options.methods, options.seeds, options.prompts)
    settings = {**origin(), "seeds": options.seeds, "prompts": options.prompts}
    result = {**settings, "rows": [asdict(row) for row in rows]}
    if options.update:
        draw_quality(result["rows"], PICTURES / "quality.png")
    conclude(options, "quality", result, text(rows))


if __name__ == "__main__":
    main()
