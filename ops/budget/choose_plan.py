"""The choice of a memory plan: the fastest one whose predicted peak keeps within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from ...quant import QTYPES, QuantError
from ...quant.plan.recipe import RECIPES
from ...quant.plan.wan_shapes import pixels_per_cell
from ...quant.units import GIB, counted
from ..lean import MemoryPlan
from .sampling_job import SamplingJob, video_frames
from .simulator import Peak, Simulator

MOST_EXTRA_ARITHMETIC = 0.03
"""The largest share of extra floating-point operations that a plan may cost."""

_LARGEST_BUDGET_GIB = 1024

_LONG_CHUNKS = (8192, 4096, 2048)
"""Numbers of tokens that keep a large GPU busy, and beyond which it gains nothing."""

_Choice = TypeVar("_Choice")


@dataclass(frozen=True)
class ChosenPlan:
    """A memory plan with its predicted peak and its cost."""

    plan: MemoryPlan | None
    """None stands for ComfyUI's own forward."""
    peak: Peak
    slowdown: float
    """Floating-point operations of the forward, divided by those of ComfyUI's own forward."""
    traffic: float = 1.0
    """Bytes that the operations of the forward read and write, divided by those of ComfyUI's own forward."""

    @property
    def is_worthwhile(self) -> bool:
        """True if it costs no more arithmetic than a plan may."""
        return self.slowdown <= 1 + MOST_EXTRA_ARITHMETIC

    @property
    def name(self) -> str:
        return "lean" if self.plan else "stock"

    def __str__(self) -> str:
        how = "ComfyUI's own forward"
        if self.plan:
            how = f"{counted(self.plan.head_groups, 'group')} of heads, {self.plan.token_chunk} tokens at a time"
            how += f" ({self.plan.chunk_without_keys} without keys)"
        return f"{self.peak}; {how}, {self.slowdown:.3f}x the arithmetic, {self.traffic:.2f}x the bytes of a step"


def budget_bytes(gib: float) -> int:
    """Return a budget of `gib` GiB in bytes; 0 is `AUTOMATIC`.

    Raises:
        QuantError: `gib` is not a number, negative, or larger than the memory of any accelerator.
    """
    if not (math.isfinite(gib) and 0 <= gib <= _LARGEST_BUDGET_GIB):
        raise QuantError(
            f"budget_gib {gib}: expected GiB of video memory, at most {_LARGEST_BUDGET_GIB}; choose the memory that"
            " ComfyUI may use, such as 3.5, or 0 to take what is there"
        )
    return round(gib * GIB)


def memory_plans(heads: int) -> list[MemoryPlan]:
    """Return the memory plans to choose from for a model with `heads` heads.

    They are sorted from coarse to fine: each needs less memory and more time than the one before.
    """
    groups = [count for count in range(1, 21) if heads % count == 0]
    by_chunk = {1 << (32768 // count).bit_length() - 1: count for count in groups}
    plans = [MemoryPlan(count, chunk) for chunk, count in by_chunk.items()]
    finest = plans[-1]
    recomputed = sorted({finest.head_groups * quarters // 4 for quarters in (1, 2, 3)} - {0})
    return [*plans, *(replace(finest, recomputed_groups=count) for count in recomputed)]


def choose_plan(simulator: Simulator, job: SamplingJob, budget: int, *, is_all: bool = False) -> ChosenPlan:
    """Return the fastest memory plan whose predicted peak is at most `budget` bytes.

    Args:
        is_all: the budget is all that can be had, so a refusal must not ask for a larger one.

    Raises:
        QuantError: every plan exceeds the budget. The message names the smallest possible budget and a number of frames
            that this budget allows.
    """
    chosen = closest_plan(simulator, job, budget)
    if chosen.peak.total_bytes > budget:
        raise QuantError(_refusal(simulator, job, budget, chosen, is_all))
    return chosen


def closest_plan(simulator: Simulator, job: SamplingJob, budget: int) -> ChosenPlan:
    """Return the fastest memory plan whose predicted peak is at most `budget` bytes, or the plan of the least peak."""
    stock = _evaluate(simulator, job, None)
    if stock.peak.total_bytes <= budget:
        return stock
    plans = memory_plans(simulator.heads)
    # The next plan takes about twice as long to simulate as one before it, so that the search begins with the coarsest.
    fitting = next((plan for plan in plans if simulator.peak(job, plan).total_bytes <= budget), None)
    if fitting and _evaluate(simulator, job, fitting).is_worthwhile:
        return _evaluate(simulator, job, _with_longer_chunks(simulator, job, budget, fitting))
    choices = [choice for choice in (_evaluate(simulator, job, plan) for plan in plans) if choice.is_worthwhile]
    return min([stock, *choices], key=lambda choice: choice.peak.total_bytes)


def _with_longer_chunks(simulator: Simulator, job: SamplingJob, budget: int, plan: MemoryPlan) -> MemoryPlan:
    """Return a plan within a budget with the longest chunks that the rest of the budget allows.

    A GPU has more to do at a time then, and each chunk is more kernels to start. Where no keys are held comes first.
    """
    longer = [length for length in _LONG_CHUNKS if length > plan.token_chunk]
    for name in ("wide_chunk", "token_chunk"):
        plans = (replace(plan, **{"wide_chunk": plan.chunk_without_keys, name: length}) for length in longer)
        plan = next((each for each in plans if simulator.peak(job, each).total_bytes <= budget), plan)
    return plan


def _evaluate(simulator: Simulator, job: SamplingJob, plan: MemoryPlan | None) -> ChosenPlan:
    peak, stock = simulator.peak(job, plan), simulator.peak(job, None)
    return ChosenPlan(plan, peak, peak.flops / stock.flops, peak.moved_bytes / max(1, stock.moved_bytes))


def _first_index(choices: Sequence[_Choice], is_enough: Callable[[_Choice], bool]) -> int:
    """Return the index of the first choice that is enough, or the number of choices if none is.

    All choices after one that is enough must be enough too: this is a binary search.
    """
    low, high = 0, len(choices)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(choices[middle]) else (middle + 1, high)
    return low


def _refusal(simulator: Simulator, job: SamplingJob, budget: int, smallest: ChosenPlan, is_all: bool) -> str:
    frames = _most_frames(simulator, job, budget, smallest.plan)
    most = counted(frames, "frame of this size keeps", "frames of this size keep")
    shorter, fewer = (
        (f"at most {most}", " or fewer frames") if frames else ("not even one frame of this size keeps", "")
    )
    missing = f"free another {_rounded_up_gib(smallest.peak.total_bytes - budget)} GiB of video memory"
    choices = [missing if is_all else f"set budget_gib to {_rounded_up_gib(smallest.peak.total_bytes)}"]
    if smaller := _largest_size(simulator, job, budget, smallest.plan):
        choices.append(f"choose {smaller}")
    if recipe := _largest_recipe(simulator, smallest.peak.total_bytes - budget, smallest.peak.weight_bytes):
        choices.append(f"load a file in {recipe} or smaller")
    return (
        f"budget of {budget / GIB:.2f} GiB: {job} needs at least {smallest.peak};"
        f" {shorter} within the budget; {', '.join(choices)}, or choose a smaller size{fewer}"
    )


def _peak_bytes(simulator: Simulator, job: SamplingJob, plan: MemoryPlan | None) -> Callable[[tuple[int, ...]], float]:
    """Return the function that predicts bytes from the shape of a latent, (batch, channels, frames, height, width).

    The simulator cannot cut the conditionings other than the text. They are assumed to shrink in proportion.
    """
    latent = job.latent
    text_only = simulator.peak(job.text_only(latent), plan).total_bytes
    others = (simulator.peak(job, plan).total_bytes - text_only) / math.prod(latent)
    return lambda smaller: simulator.peak(job.text_only(smaller), plan).total_bytes + others * math.prod(smaller)


def _most_frames(simulator: Simulator, job: SamplingJob, budget: int, plan: MemoryPlan | None) -> int:
    """Return the largest number of video frames that `budget` bytes allow with `plan`, 0 if none."""
    batch, channels, frames, *size = job.latent
    nbytes = _peak_bytes(simulator, job, plan)
    fewer = [(batch, channels, count, *size) for count in range(frames - 1, 0, -1)]
    index = _first_index(fewer, lambda latent: nbytes(latent) <= budget)
    return video_frames(fewer[index][2]) if index < len(fewer) else 0


def _largest_size(simulator: Simulator, job: SamplingJob, budget: int, plan: MemoryPlan | None) -> str:
    """Return the largest size of about the same shape that `budget` bytes allow for as many frames, "" if none."""
    *other, height, width = job.latent
    nbytes, side = _peak_bytes(simulator, job, plan), pixels_per_cell(job.latent[1])

    def scaled(cells: int, sixteenths: int) -> int:
        return max(2, cells * sixteenths // 16 // 2 * 2)

    smaller = [(*other, scaled(height, part), scaled(width, part)) for part in range(15, 3, -1)]
    index = _first_index(smaller, lambda latent: nbytes(latent) <= budget)
    if index == len(smaller):
        return ""
    *_, height, width = smaller[index]
    return f"{side * width}x{side * height}"


def _largest_recipe(simulator: Simulator, shortage: int, weight_bytes: int) -> str:
    """Return the recipe of the most bits a weight that makes the weights smaller by `shortage` bytes, "" if none."""
    elements = simulator.weight_elements
    if not elements:
        return ""
    allowed = 8 * (weight_bytes - shortage) / elements
    # The largest layers get a mix's widest type.
    bits = {
        name: max(QTYPES[kind].bits_per_weight for kind in recipe.types)
        for name, recipe in RECIPES.items()
        if not (recipe.is_native or recipe.experimental)
    }
    return max((name for name in bits if bits[name] <= allowed), key=lambda name: bits[name], default="")


def _rounded_up_gib(nbytes: int) -> float:
    """Return `nbytes` in GiB, rounded up to two decimals."""
    return math.ceil(100 * nbytes / GIB) / 100
