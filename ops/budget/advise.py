"""Which file to use for each published Wan model, and how to sample it, on a machine with some memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...quant.plan.recipe import GGUF_RECIPES, Recipe
from ...quant.qtype import QTYPES
from ...quant.units import GIB
from .choose_plan import ChosenPlan, closest_plan
from .published import PUBLISHED, PublishedModel, Video

OTHERS_GIB = 0.5
"""Video memory that the desktop and other programs hold on the only GPU of a machine."""
RAM_BESIDE_GIB = 6.0
"""Main memory for the system, ComfyUI and the frames of a video, beside the weights."""
_MOST_BITS = "Q8_0"


@dataclass(frozen=True)
class Advice:
    """How to sample a video of one model.

    Attributes:
        files: of the model; Wan 2.2 A14B has two.
        file_gib: of one file in the recipe.
        ram_gib: main memory that the machine needs.
        vram_gib: predicted peak of video memory.
        node: Wan Low VRAM, or "" if ComfyUI's own forward fits.
        arithmetic: floating-point operations over those of ComfyUI's own forward.
        streamed_gib: weights that are copied to the GPU in each step.
        reason: why the video does not fit, or "".
    """

    model: str
    video: Video
    files: int
    recipe: str
    file_gib: float
    ram_gib: float
    vram_gib: float
    node: str
    budget_gib: float
    arithmetic: float
    streamed_gib: float
    reason: str = ""


@dataclass(frozen=True)
class AdviceReport:
    """The advice for a machine.

    Attributes:
        vram_gib, ram_gib: memory of the machine.
    """

    vram_gib: float
    ram_gib: float
    advice: Sequence[Advice]

    def json(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """Return a table in Markdown, with sizes in GiB."""
        head = ("model", "video", "file", "how", "video memory", "main memory", "arithmetic", "copied per step")
        rows = [head, ("---",) * len(head), *map(_cells, self.advice)]
        lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        return (
            f"{lines}\n\nFor {self.vram_gib:g} GiB of video memory, of which other programs hold {OTHERS_GIB:g}, and"
            f" {self.ram_gib:g} GiB of main memory. Sizes are in GiB, and predicted: nothing was run."
        )


def advise(vram_gib: float, ram_gib: float, models: Sequence[PublishedModel] = PUBLISHED) -> AdviceReport:
    """Return the advice for each model and each of its videos."""
    advice = [each for model in models for each in _of_model(model, vram_gib, ram_gib)]
    return AdviceReport(vram_gib, ram_gib, advice)


def _of_model(model: PublishedModel, vram_gib: float, ram_gib: float) -> Iterator[Advice]:
    recipe = _largest_recipe(model, ram_gib)
    simulated, budget = model.simulator(recipe), round((vram_gib - OTHERS_GIB) * GIB)
    file = model.file_bytes(recipe)
    ram = model.files * file / GIB + RAM_BESIDE_GIB
    for video in model.videos:
        choice = closest_plan(simulated, model.job(video), budget)
        yield Advice(
            model.name,
            video,
            model.files,
            recipe.name,
            round(file / GIB, 2),
            round(ram, 1),
            round(choice.peak.total_bytes / GIB, 2),
            "Wan Low VRAM" if choice.plan else "",
            round(budget / GIB, 2),
            round(choice.slowdown, 3),
            round(max(0, file - max(0, budget - choice.peak.total_bytes)) / GIB, 2),
            _reason(choice, budget, ram, ram_gib),
        )


def _largest_recipe(model: PublishedModel, ram_gib: float) -> Recipe:
    """Return the recipe with the most bits, at most those of Q8_0, whose files fit into main memory.

    If none fits, it is the smallest. Types of small blocks, except Q8_0, are left out for their errors.
    """
    most = GGUF_RECIPES[_MOST_BITS]
    found = [each for each in GGUF_RECIPES.values() if not each.experimental and QTYPES[each.base].block_size == 256]
    by_size = sorted((model.file_bytes(recipe), recipe.name) for recipe in (most, *found))
    room = (ram_gib - RAM_BESIDE_GIB) * GIB
    fitting = [name for nbytes, name in by_size if model.files * nbytes <= room]
    return GGUF_RECIPES[fitting[-1] if fitting else by_size[0][1]]


def _reason(choice: ChosenPlan, budget: int, ram: float, ram_gib: float) -> str:
    if choice.peak.total_bytes > budget:
        return f"needs {(choice.peak.total_bytes / GIB + OTHERS_GIB):.2f} GiB of video memory; choose a smaller video"
    return f"needs {ram:.1f} GiB of main memory" if ram > ram_gib else ""


def _cells(advice: Advice) -> tuple[str, ...]:
    width, height, frames = advice.video
    file = f"{'2 x ' if advice.files == 2 else ''}{advice.recipe}, {advice.file_gib:.2f}"
    how = advice.reason or (f"{advice.node}, budget {advice.budget_gib:g}" if advice.node else "loader alone")
    numbers = (f"{advice.vram_gib:.2f}", f"{advice.ram_gib:.1f}", f"{advice.arithmetic:.3f}x")
    return (advice.model, f"{width}x{height}x{frames}", file, how, *numbers, f"{advice.streamed_gib:.2f}")
