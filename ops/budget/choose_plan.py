"""The choice of a memory plan: the fastest one whose predicted peak keeps within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ...quant import QuantError
from ...quant.units import GIB
from ..lean import MemoryPlan
from .sampling_job import SamplingJob, video_frames
from .simulator import Peak, Simulator

MOST_EXTRA_ARITHMETIC = 0.03
"""The largest share of extra floating-point operations that a plan may cost."""

_LARGEST_BUDGET_GIB = 1024


@dataclass(frozen=True)
class ChosenPlan:
    """A memory plan with its predicted peak and its cost."""

    plan: MemoryPlan | None
    """None stands for ComfyUI's own forward."""
    peak: Peak
    slowdown: float
    """Floating-point operations of the forward, divided by those of ComfyUI's own forward."""

    @property
    def name(self) -> str:
        return "lean" if self.plan else "stock"

    def __str__(self) -> str:
        how = "ComfyUI's own forward"
        if self.plan:
            how = f"{self.plan.head_groups} groups of heads, {self.plan.token_chunk} tokens at a time"
        return f"{self.peak}; {how}, {self.slowdown:.3f}x the arithmetic"


def budget_bytes(gib: float) -> int:
    """Return a budget of `gib` GiB in bytes.

    Raises:
        QuantError: `gib` is not a number, not positive, or larger than the memory of any accelerator.
    """
    if not (math.isfinite(gib) and 0 < gib <= _LARGEST_BUDGET_GIB):
        raise QuantError(
            f"budget_gib {gib}: expected GiB of video memory, more than 0 and at most {_LARGEST_BUDGET_GIB};"
            " choose the memory that ComfyUI may use, such as 3.5"
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


def choose_plan(simulator: Simulator, job: SamplingJob, budget: int) -> ChosenPlan:
    """Return the fastest memory plan whose predicted peak is at most `budget` bytes.

    Raises:
        QuantError: every plan exceeds the budget. The message names the smallest possible budget and a number of frames
            that this budget allows.
    """
    chosen = closest_plan(simulator, job, budget)
    if chosen.peak.total_bytes > budget:
        raise QuantError(_refusal(simulator, job, budget, chosen))
    return chosen


def closest_plan(simulator: Simulator, job: SamplingJob, budget: int) -> ChosenPlan:
    """Return the fastest memory plan whose predicted peak is at most `budget` bytes, or the plan of the least peak."""
    stock = _evaluate(simulator, job, None)
    if stock.peak.total_bytes <= budget:
        return stock
    plans = memory_plans(simulator.heads)
    index = _first_index(plans, lambda plan: simulator.peak(job, plan).total_bytes <= budget)
    chosen = _evaluate(simulator, job, plans[min(index, len(plans) - 1)])
    while chosen.slowdown > 1 + MOST_EXTRA_ARITHMETIC:
        plans.pop()
        chosen = _evaluate(simulator, job, plans[-1])
    is_enough = chosen.peak.total_bytes <= budget
    return chosen if is_enough else min(stock, chosen, key=lambda each: each.peak.total_bytes)


def _evaluate(simulator: Simulator, job: SamplingJob, plan: MemoryPlan | None) -> ChosenPlan:
    peak = simulator.peak(job, plan)
    return ChosenPlan(plan, peak, peak.flops / simulator.peak(job, None).flops)


def _first_index(plans: Sequence[MemoryPlan], is_enough: Callable[[MemoryPlan], bool]) -> int:
    """Return the index of the first plan that is enough, or the number of plans if none is.

    All plans after one that is enough must be enough too: this is a binary search.
    """
    low, high = 0, len(plans)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(plans[middle]) else (middle + 1, high)
    return low


def _refusal(simulator: Simulator, job: SamplingJob, budget: int, smallest: ChosenPlan) -> str:
    frames = _most_frames(simulator, job, budget, smallest.plan)
    shorter = f"at most {frames} frames of this size keep" if frames else "not even one frame of this size keeps"
    return (
        f"budget of {budget / GIB:.2f} GiB: {job} needs at least {smallest.peak};"
        f" {shorter} within the budget; set budget_gib to {_rounded_up_gib(smallest.peak.total_bytes)},"
        " or choose a smaller size or fewer frames"
    )


def _most_frames(simulator: Simulator, job: SamplingJob, budget: int, plan: MemoryPlan | None) -> int:
    """Return the largest number of video frames that `budget` bytes allow with `plan`, 0 if none."""

    def text_only_bytes(frames: int) -> int:
        return simulator.peak(job.text_only(frames), plan).total_bytes

    low, high = 0, job.latent[2]  # `low` latent frames are within the budget, `high` are not
    # The simulator cannot cut the other conditionings to fewer frames. They are assumed to shrink in proportion.
    others_per_frame = (simulator.peak(job, plan).total_bytes - text_only_bytes(high)) / high
    while high - low > 1:
        middle = (low + high) // 2
        is_within = text_only_bytes(middle) + others_per_frame * middle <= budget
        low, high = (middle, high) if is_within else (low, middle)
    return video_frames(low) if low else 0


def _rounded_up_gib(nbytes: int) -> float:
    """Return `nbytes` in GiB, rounded up to two decimals."""
    return math.ceil(100 * nbytes / GIB) / 100
