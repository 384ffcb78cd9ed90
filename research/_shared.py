"""Inputs of TinyWan's blocks, and comparison of a method with calibrated files; the studies share these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wanquant.bench import harness
from wanquant.bench.comparison import Gain
from wanquant.bench.tinywan.data import Caption
from wanquant.bench.tinywan.model import velocity
from wanquant.bench.tinywan.reference import STEPS, Errors, gains, origin
from wanquant.bench.tinywan.score import generate

RESULTS = Path(__file__).resolve().parent / "results"
# A seed that neither the measured clips nor the calibration uses.
_SEED = 4
# Clips in one call of a block.
_CLIPS = 2

Pair = tuple[Errors, Errors]
"""The errors of a calibrated file and of the file that is compared with it."""


class Call(NamedTuple):
    """The arguments of one call of a transformer block.

    Attributes:
        tokens: float32, (clips, tokens, channels).
        others: the keyword arguments.
    """

    tokens: Tensor
    others: dict[str, Any]


def block_inputs(model: torch.nn.Module, captions: Sequence[Caption]) -> list[Call]:
    """Return the calls of the first block while `model` samples one clip per caption, a few clips per call."""
    calls: list[tuple[Tensor, dict[str, Any]]] = []
    hook = model.blocks[0].register_forward_pre_hook(
        lambda _, inputs, others: calls.append((inputs[0], others)), with_kwargs=True
    )
    generate(velocity(model), captions, seed=_SEED, steps=STEPS, batch=len(captions))
    hook.remove()
    return [
        Call(tokens[part], {**others, "e": others["e"][part], "context": others["context"][part]})
        for tokens, others in calls
        for part in (slice(first, first + _CLIPS) for first in range(0, len(captions), _CLIPS))
    ]


@dataclass(frozen=True)
class Comparison:
    """The calibrated files of one recipe, in dB, and how many dB closer the compared files are.

    Attributes:
        calibrated: means over the files, by the names of `Errors.means`.
        gains: by the same names.
    """

    recipe: str
    calibrated: dict[str, float]
    gains: dict[str, Gain]

    @classmethod
    def of(cls, recipe: str, pairs: Sequence[Pair]) -> Comparison:
        calibrated, compared = zip(*pairs, strict=True)
        found = gains(compared, calibrated)
        return cls(recipe, {key: fmean(file.means[key] for file in calibrated) for key in found}, found)


def run(
    description: str | None,
    path: Path,
    measure: Callable[[Sequence[str], int, int, int], Mapping[str, Sequence[Pair]]],
    **defaults: object,
) -> None:
    """Run a study as the command line says, and print the gain over calibrated files in brackets.

    Args:
        path: the results file that `--update` writes.
        measure: takes recipes, roundings, clips per rounding and captions; returns the pairs of each recipe.
        defaults: of the options.
    """
    parser = harness.arguments(description, update=path)
    parser.add_argument("--recipes", nargs="+")
    parser.add_argument("--roundings", type=int, help="networks that differ in the order of their channels")
    parser.add_argument("--seeds", type=int, help="clips per network")
    parser.add_argument("--prompts", type=int, help="captions to calibrate on")
    parser.set_defaults(**defaults)
    options = parser.parse_args()
    pairs = measure(options.recipes, options.roundings, options.seeds, options.prompts)
    rows = [Comparison.of(recipe, found) for recipe, found in pairs.items()]
    cells = [(row.recipe, *(f"{row.calibrated[key]:.1f} ({gain})" for key, gain in row.gains.items())) for row in rows]
    settings = {**origin(), "roundings": options.roundings, "seeds": options.seeds, "prompts": options.prompts}
    result = {**settings, "rows": [asdict(row) for row in rows]}
    harness.conclude(options, result, harness.table(("recipe", *rows[0].gains), cells))
