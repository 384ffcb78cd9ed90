"""Number of prompts that an importance matrix and a calibration need: error of TinyWan's steps by captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from wanquant.bench import harness
from wanquant.bench.comparison import Spread
from wanquant.bench.tinywan.data import TRAINING
from wanquant.bench.tinywan.reference import (
    CHECKPOINT,
    Reference,
    collect,
    load_model,
    load_weights,
    origin,
    prompts,
)
from wanquant.quant.conversion.layer_encoder import LayerEncoder
from wanquant.quant.plan.recipe import find_recipe, plan_types
from wanquant.quant.sources.checkpoint import open_checkpoint
from wanquant.quant.statistics.calibration import CalibrationCollector
from wanquant.quant.statistics.importance import Collector
from wanquant.testing.hosts import ROOT

COUNTS = (0, 1, 2, 4, 8, 16, len(TRAINING))
COLLECTORS = {"importance": Collector, "calibrated": CalibrationCollector}


@dataclass(frozen=True)
class Point:
    """SQNR of the velocity in dB, averaged over the steps: mean and deviation over draws of captions."""

    method: str
    prompts: int
    velocity_sqnr: Spread


def measure(recipe: str, counts: Sequence[int], draws: int, clips: int) -> list[Point]:
    """Return all points; 0 captions stand for a conversion without statistics, which is the same for both methods."""
    reference, source = Reference.sample(clips), load_weights()
    with open_checkpoint(CHECKPOINT) as file:
        types = plan_types(find_recipe(recipe), file.tensors).types

    def sqnr(method: str, count: int, draw: int) -> float:
        captions = prompts(count, start=draw * (1 + len(TRAINING) // draws)) if count else []
        known = collect(source, captions, COLLECTORS[method]())[0] if captions else {}
        weights = {
            name: qtype.dequantize(LayerEncoder.of(known, name).quantize(qtype, source[name]))
            if qtype.block_size > 1
            else source[name]
            for name, qtype in types.items()
        }
        steps = reference.velocity_sqnr(load_model(weights))
        return sum(steps) / len(steps)

    return [
        Point(method, count, Spread.of([sqnr(method, count, draw) for draw in range(draws)]))
        for method in COLLECTORS
        for count in counts
    ]


def text(points: Sequence[Point]) -> str:
    rows = [(p.method, str(p.prompts), f"{p.velocity_sqnr.mean:.2f} ± {p.velocity_sqnr.deviation:.2f}") for p in points]
    return harness.table(("method", "captions", "velocity"), rows)


def main() -> None:
    parser = harness.arguments(__doc__, update=ROOT / "research" / "results" / "importance-prompts.json")
    parser.add_argument("--recipe", default="Q3_K_M")
    parser.add_argument("--counts", nargs="+", type=int, default=COUNTS)
    parser.add_argument("--draws", type=int, default=3, help="random sets of captions for each count")
    parser.add_argument("--seeds", type=int, default=4)
    options = parser.parse_args()
    points = measure(options.recipe, options.counts, options.draws, options.seeds)
    settings = {**origin(), "recipe": options.recipe, "draws": options.draws}
    result = {**settings, "points": [asdict(point) for point in points]}
    harness.conclude(options, result, text(points))


if __name__ == "__main__":
    main()
