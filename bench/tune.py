"""Gain of tuning block by block over calibrated conversion at effort thorough, on TinyWan at equal bytes.

Both see the same captions. Several equal networks that differ in the order of their channels are made by both, and each
pair is compared on the same seeds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from wanquant.bench import harness, tasks
from wanquant.bench.comparison import Gain
from wanquant.bench.tinywan.data import Caption
from wanquant.bench.tinywan.encodings import Workshop
from wanquant.bench.tinywan.model import velocity
from wanquant.bench.tinywan.reference import (
    CALIBRATION_SEED,
    STEPS,
    Errors,
    Reference,
    Weights,
    gains,
    load_model,
    load_module,
    origin,
    prompts,
)
from wanquant.bench.tinywan.score import generate
from wanquant.quant import open_gguf
from wanquant.quant.sources.checkpoint import open_checkpoint
from wanquant.quant.tuning.block import BlockModule
from wanquant.quant.tuning.capture import Capture, CapturedCalls
from wanquant.quant.tuning.tune import TuneSettings, tune

RECIPES = ("Q4_K_M", "Q3_K_M", "Q2_K", "IQ2_XXS", "IQ1_M")
# Clips in one call of a block.
_CLIPS = 2
_MAX_BYTES = 1 << 28


@dataclass(frozen=True)
class Comparison:
    """The conversions of one recipe, in dB, and how many dB closer the tuned files are.

    Attributes:
        thorough: means over the files, by the names of `Errors.means`.
        gains: by the same names.
    """

    recipe: str
    nbytes: int
    thorough: dict[str, float]
    gains: dict[str, Gain]

    @classmethod
    def of(cls, recipe: str, nbytes: int, pairs: Sequence[tuple[Errors, Errors]]) -> Comparison:
        converted, tuned = zip(*pairs, strict=True)
        found = gains(tuned, converted)
        return cls(recipe, nbytes, {key: fmean(file.means[key] for file in converted) for key in found}, found)

    def cells(self) -> list[str]:
        """Return the figures of a row of the table."""
        return [f"{self.thorough[key]:.1f} ({gain})" for key, gain in self.gains.items()]


@contextmanager
def captured(source: Weights, captions: Sequence[Caption]) -> Iterator[CapturedCalls]:
    """Capture all calls of the first block while the model samples one clip of each caption, a few clips per call."""
    model = load_module(source)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        capture = Capture(folder, _MAX_BYTES)
        signature = torch.stack([block.modulation.detach().flatten() for block in model.blocks])

        def add(_: torch.nn.Module, inputs: tuple[Any, ...], others: Mapping[str, Any]) -> None:
            call = {"x": inputs[0], **{key: value for key, value in others.items() if key != "transformer_options"}}
            capture.add(call, signature)

        model.blocks[0].register_forward_pre_hook(add, with_kwargs=True)
        generate(velocity(model), captions, seed=CALIBRATION_SEED, steps=STEPS, batch=_CLIPS)
        calls = CapturedCalls.open(capture.write(folder / "capture.safetensors"))
        yield calls
        calls.close()


def tuned(workshop: Workshop, calls: CapturedCalls, recipe: str) -> Weights:
    """Return the dequantized weights of a tuned file, which is as large as the converted one."""
    path = workshop.folder / f"{recipe}-tuned.gguf"
    block = BlockModule(load_module(workshop.source).blocks[0].requires_grad_(False), {"transformer_options": {}})
    tune(open_checkpoint(workshop.checkpoint), path, recipe, calls, block, TuneSettings("thorough"))
    return {name: tensor.dequantize() for name, tensor in open_gguf(path).tensors.items()}


def measure_file(order: int, recipe: str, clips: int, captions: int) -> harness.Row:
    """Return the bytes of a file of one network, and its errors without and with tuning.

    Args:
        order: of the network's channels.
        clips: to compare.
        captions: to calibrate and to capture.
    """
    reference = Reference.sample(clips, order)
    with Workshop.open(prompts(captions), order) as workshop, captured(workshop.source, prompts(captions)) as calls:
        file = workshop.thorough(recipe)
        files = (file.weights, tuned(workshop, calls, recipe))
        converted, ours = (asdict(reference.errors(load_model(weights))) for weights in files)
    return {"nbytes": file.nbytes, "converted": converted, "tuned": ours}


def measure(recipes: Sequence[str], roundings: int, *settings: int, **execution: Any) -> list[Comparison]:
    """Measure every recipe.

    Args:
        roundings: the number of networks.
        settings: further arguments of `measure_file`.
        execution: of the tasks, see `tasks.run`.
    """
    files = list(product(range(roundings), recipes))
    rows = tasks.run(measure_file, [(*file, *settings) for file in files], **execution)
    compared = []
    for recipe in recipes:
        found = [row for (_, name), row in zip(files, rows, strict=True) if name == recipe]
        pairs = [(Errors(**row["converted"]), Errors(**row["tuned"])) for row in found]
        compared.append(Comparison.of(recipe, found[0]["nbytes"], pairs))
    return compared


def main() -> None:
    parser = harness.arguments(__doc__, update=harness.RESULTS / "tune.json")
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--roundings", type=int, default=8, help="networks that differ in the order of their channels")
    parser.add_argument("--seeds", type=int, default=8, help="clips per network")
    parser.add_argument("--prompts", type=int, default=8, help="captions to calibrate and to capture")
    tasks.add_arguments(parser)
    options = parser.parse_args()
    settings = {"roundings": options.roundings, "seeds": options.seeds, "prompts": options.prompts}
    rows = measure(options.recipes, *settings.values(), jobs=options.jobs, record=options.record)
    cells = [[row.recipe, f"{row.nbytes / 1e6:.2f}", *row.cells()] for row in rows]
    result = {**origin(), **settings, "rows": [asdict(row) for row in rows]}
    harness.conclude(options, result, harness.table(("recipe", "MB", *rows[0].gains), cells))


if __name__ == "__main__":
    main()
