"""A number of GiB -> how to sample a Wan model in it: the fastest plan whose simulated peak is within the budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ...quant import QuantError
from ...quant.units import GIB
from ..lean import LeanPlan
from .sampling_job import Job
from .simulator import Peak, Simulator

MOST_EXTRA_ARITHMETIC = 0.03
_ABSURD_GIB = 1024


@dataclass(frozen=True)
class Choice:
    """A plan, what it takes and what it costs."""

    plan: LeanPlan | None
    """None: the host's own forward."""
    peak: Peak
    slowdown: float
    """Floating-point operations over those of the host's own forward."""

    @property
    def name(self) -> str:
        return "lean" if self.plan else "stock"

    def __str__(self) -> str:
        how = "ComfyUI's own forward"
        if self.plan:
            how = f"{self.plan.head_groups} groups of heads, {self.plan.token_chunk} tokens at a time"
        return f"{self.peak}; {how}, {self.slowdown:.3f}x the arithmetic"


def checked_budget(gib: float) -> int:
    """Bytes.

    Raises:
        QuantError: not a number, not positive, or more than any accelerator has.
    """
    if not (math.isfinite(gib) and 0 < gib <= _ABSURD_GIB):
        raise QuantError(
            f"budget_gib {gib}: expected GiB of video memory, more than 0 and at most {_ABSURD_GIB}; 3.5 is usual"
        )
    return round(gib * GIB)


def candidates(heads: int) -> list[LeanPlan]:
    """From coarse to fine, each slower than the one before and smaller."""
    groups = [count for count in range(1, 21) if heads % count == 0]
    by_chunk = {1 << (32768 // count).bit_length() - 1: count for count in groups}
    plans = [LeanPlan(count, chunk) for chunk, count in by_chunk.items()]
    finest = plans[-1]
    again = sorted({finest.head_groups * quarters // 4 for quarters in (1, 2, 3)} - {0})
    return [*plans, *(replace(finest, recomputed_groups=count) for count in again)]


def choose(simulator: Simulator, job: Job, budget: int) -> Choice:
    """The plan with the least slowdown that keeps within `budget` bytes.

    Raises:
        QuantError: none does; says what the leanest needs and what would fit.
    """
    stock = _choice(simulator, job, None)
    if stock.peak.total <= budget:
        return stock
    plans = candidates(simulator.heads)
    fitting = _first(plans, lambda plan: simulator.peak(job, plan).total <= budget)
    choice = _choice(simulator, job, plans[min(fitting, len(plans) - 1)])
    while choice.slowdown > 1 + MOST_EXTRA_ARITHMETIC:
        plans.pop()
        choice = _choice(simulator, job, plans[-1])
    if choice.peak.total > budget:
        leanest = min(stock, choice, key=lambda each: each.peak.total)
        raise QuantError(_refusal(simulator, job, budget, leanest))
    return choice


def _choice(simulator: Simulator, job: Job, plan: LeanPlan | None) -> Choice:
    peak = simulator.peak(job, plan)
    return Choice(plan, peak, peak.flops / simulator.peak(job, None).flops)


def _first(items: Sequence[LeanPlan], fits: Callable[[LeanPlan], bool]) -> int:
    """The position of the first item that fits, where all after it do too; their number if none does."""
    low, high = 0, len(items)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(items[middle]) else (middle + 1, high)
    return low


def _refusal(simulator: Simulator, job: Job, budget: int, leanest: Choice) -> str:
    frames = _most_frames(simulator, job, budget, leanest.plan)
    shorter = f"{frames} frames of this size would fit" if frames else "not even one frame of this size would fit"
    return (
        f"budget of {budget / GIB:.2f} GiB: {job} needs at least {leanest.peak};"
        f" {shorter}; give {_round_up(leanest.peak.total)} GiB, or a smaller size or fewer frames"
    )


def _most_frames(simulator: Simulator, job: Job, budget: int, plan: LeanPlan | None) -> int:
    """Frames of video within the budget, 0 if none."""

    def plain(frames: int) -> int:
        return simulator.peak(job.from_text(frames), plan).total

    low, high = 0, job.latent[2]  # so many latent frames fit, so many do not
    # What is given beside the text cannot be cut here; it is taken to shrink with the frames.
    given_a_frame = (simulator.peak(job, plan).total - plain(high)) / high
    while high - low > 1:
        middle = (low + high) // 2
        fits = plain(middle) + given_a_frame * middle <= budget
        low, high = (middle, high) if fits else (low, middle)
    return 4 * low - 3 if low else 0


def _round_up(nbytes: int) -> float:
    """GiB with two decimals."""
    return math.ceil(100 * nbytes / GIB) / 100
