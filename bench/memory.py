"""Peak video memory of published Wan models, with and without Wan Low VRAM; simulated, needs no GPU."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..quant.plan.wan_shapes import SIZES, VACE_14B
from . import harness

if TYPE_CHECKING:
    from ..ops.budget.choose_plan import ChosenPlan

MODELS = {
    "1.3B-T2V": SIZES["1.3B"],
    "5B-TI2V": SIZES["5B"],
    "14B-T2V": SIZES["14B"],
    "14B-I2V": SIZES["I2V-14B"],
    "14B-VACE": VACE_14B,
}


class Video(NamedTuple):
    width: int
    height: int
    frames: int


SMALL, LARGE = Video(832, 480, 81), Video(1280, 720, 81)
UNLIMITED_GIB = 24
# The videos of each model, with a budget in GiB.
CASES = {
    "1.3B-T2V": ((SMALL, 1.2), (LARGE, 1.75)),
    "5B-TI2V": ((SMALL, 1.2), (Video(1280, 704, 121), 1.6)),
    "14B-T2V": ((SMALL, 2.0), (LARGE, 3.5)),
    "14B-I2V": ((SMALL, 2.0), (LARGE, 3.5)),
    "14B-VACE": ((SMALL, 3.5), (LARGE, 7.0)),
}
PRECISIONS = ("exact", "int8")
# Nearly the smallest budgets that it takes.
LEAST = {("14B-T2V", "exact", SMALL): (1.85,), ("14B-T2V", "exact", LARGE): (2.9,)}


def rows(recipe: str, loras: int = 0) -> Iterator[dict[str, object]]:
    """Yield ComfyUI's own forward and the plans of Wan Low VRAM for each model and video."""
    from ..ops.budget.choose_plan import choose_plan
    from ..ops.budget.published import patcher, sampling
    from ..ops.budget.row_room import row_room
    from ..ops.budget.simulator import Simulator

    for model, size in MODELS.items():
        for precision in PRECISIONS:
            loaded = patcher(size, recipe, loras, precision)
            simulated = Simulator.from_patcher(loaded)
            for video, budget in CASES[model]:
                wanted = sampling(size, video)
                for gib in (UNLIMITED_GIB, budget, *LEAST.get((model, precision, video), ())):
                    choice = choose_plan(simulated, wanted, round(gib * harness.GIB))
                    room = row_room(loaded, wanted, choice.peak, round(gib * harness.GIB))
                    more = {"precision": precision, "int8_rows_gib": round(room.nbytes / harness.GIB, 4)}
                    yield row(model, video, recipe, choice, gib) | more


def row(model: str, video: Video, recipe: str, choice: ChosenPlan, budget: float) -> dict[str, object]:
    parts = {name: round(nbytes / harness.GIB, 4) for name, nbytes in choice.peak.bytes_by_part.items()}
    return {
        "model": model,
        **video._asdict(),
        "recipe": recipe,
        "plan": choice.name,
        "budget_gib": budget,
        "peak_gib": round(choice.peak.total_bytes / harness.GIB, 4),
        "parts": parts,
        "slowdown": round(choice.slowdown, 4),
        "traffic": round(choice.traffic, 3),
    }


def text(rows: list[dict[str, Any]]) -> str:
    parts = ("weights", "scratch", "activations", "fragmentation", "context")
    columns = ("model", "video", "products", "plan", "budget", "peak", *parts, "arithmetic", "bytes", "int8 rows")
    cells = []
    for row in rows:
        sizes = [row["budget_gib"], row["peak_gib"], *row["parts"].values()]
        video = f"{row['width']}x{row['height']}x{row['frames']}"
        relative = f"{row['slowdown']:.3f}x", f"{row['traffic']:.2f}x", f"{row['int8_rows_gib']:.2f}"
        cells.append([row["model"], video, row["precision"], row["plan"], *(f"{x:.2f}" for x in sizes), *relative])
    return harness.table(columns, cells)


def draw(path: Path, recipe: str) -> None:
    """Draw the memory over the course of one block of 14B, with embeddings and head, as PNG."""
    from ..ops.budget.choose_plan import choose_plan
    from ..ops.budget.published import sampling, simulator

    model = "14B-T2V"
    video, budget = CASES[model][0]
    simulated, wanted = simulator(MODELS[model], recipe), sampling(MODELS[model], video)
    figure = harness.new_figure(10, 5)
    axis = figure.add_subplot()
    plans = (
        ("ComfyUI's own forward", UNLIMITED_GIB, "#d55e00"),
        (f"Wan Low VRAM, {budget:.2f} GiB", budget, "#0072b2"),
    )
    peaks = []
    for label, gib, colour in plans:
        choice = choose_plan(simulated, wanted, round(gib * harness.GIB))
        history = simulated.run(wanted, choice.plan, record=True).history
        done = [100 * moment.flops / choice.peak.flops for moment in history]
        beside = choice.peak.weight_bytes + choice.peak.context_bytes
        total = [(beside + moment.nbytes) / harness.GIB for moment in history]
        peaks.append(max(total))
        axis.plot(done, total, color=colour, drawstyle="steps-post", label=f"{label}: peak {peaks[-1]:.2f} GiB")
        axis.fill_between(done, total, step="post", color=colour, alpha=0.2, linewidth=0)
    axis.axhspan(
        0,
        beside / harness.GIB,
        color="#999999",
        label=f"CUDA's context and streamed weights: {beside / harness.GIB:.2f} GiB",
    )
    axis.set(xlim=(0, 100), ylim=(0, 4.2), xlabel="arithmetic done, %", ylabel="GiB of video memory (simulated)")
    which = f"{model} in {recipe}, {video.width}x{video.height}, {video.frames} frames"
    axis.set_title(f"A block needs {peaks[1]:.2f} GiB instead of {peaks[0]:.2f} GiB ({which})", fontsize=12, loc="left")
    axis.grid(alpha=0.3)
    axis.legend(loc="upper right")
    figure.savefig(path)


def main() -> None:
    parser = harness.arguments(__doc__, update=harness.RESULTS / "memory-simulated.json")
    parser.add_argument("--recipe", default="Q4_K_M")
    parser.add_argument("--loras", type=int, default=0, help="number of LoRAs of rank 64 on every quantized layer")
    parser.add_argument(
        "--picture", type=Path, help="only draw the memory over the course of one block of 14B, to this PNG"
    )
    options = parser.parse_args()
    harness.import_comfyui()
    logging.getLogger().setLevel(logging.ERROR)
    if options.picture:
        draw(options.picture, options.recipe)
        return
    found = list(rows(options.recipe, options.loras))
    harness.conclude(options, {"machine": harness.SIMULATED, "rows": found}, text(found))


if __name__ == "__main__":
    main()
