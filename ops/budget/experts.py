"""Two models that are never in memory together, as the high-noise and the low-noise expert of Wan 2.2 need not be."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import comfy.model_management
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ..lean import LeanPlan
from .sampling_job import Job
from .simulator import Peak, Simulator


def share_memory(first: ModelPatcher, second: ModelPatcher) -> None:
    """Give both one place in memory: the one that is sampled takes it, and the other goes back to its file.

    The host unloads a model only when it reckons that memory is short, and then perhaps a part of it. Here the place is
    free before it makes its plan for the next, so that a plan for the larger of both holds for either. Clones, and
    so the models that LoRA loaders and other nodes make of them, belong to it too.
    """
    place = _Place(first, second)
    for patcher, other in ((first, second), (second, first)):
        patcher.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, __name__, _Eviction(other))
        patcher.set_attachments(__name__, place)


def simulate(patcher: ModelPatcher) -> Simulator:
    """Of a loaded MODEL with its LoRAs; where it shares its memory, of whichever model takes more."""
    place: _Place | None = patcher.get_attachment(__name__)
    return Larger([Simulator.of(each) for each in place.with_latest(patcher)]) if place else Simulator.of(patcher)


class Larger(Simulator):
    """Several models that have one plan: for each job the one that takes most memory."""

    def __init__(self, simulators: list[Simulator]) -> None:
        self._each = simulators

    @property
    def heads(self) -> int:
        return self._each[0].heads

    def peak(self, job: Job, plan: LeanPlan | None) -> Peak:
        return max((simulator.peak(job, plan) for simulator in self._each), key=lambda peak: peak.total)


class _Place:
    """What two models share: of each the patcher that was simulated last, so with the LoRAs that it is sampled with."""

    def __init__(self, *patchers: ModelPatcher) -> None:
        # References would be cycles, and the models would wait for the garbage collector.
        self._first = [weakref.ref(patcher) for patcher in patchers]
        self._latest = list(self._first)

    def with_latest(self, patcher: ModelPatcher) -> list[ModelPatcher]:
        """`patcher`, and the other model's if it is still there."""
        others = []
        for index, (first, latest) in enumerate(zip(self._first, self._latest, strict=True)):
            other = latest() or first()
            if other is not None and other.is_clone(patcher):
                self._latest[index] = weakref.ref(patcher)
            elif other is not None:
                others.append(other)
        return [patcher, *others]


class _Eviction:
    """Before the host loads a model to sample it: unload another from every device and pinned memory."""

    def __init__(self, other: ModelPatcher) -> None:
        # A reference would be a cycle, and both models would wait for the garbage collector.
        self._other = weakref.ref(other)

    def __call__(self, prepare: Callable[..., Any], *args: object, **kwargs: object) -> Any:  # noqa: ANN401
        other = self._other()
        if other is not None:
            comfy.model_management.unload_model_and_clones(other, all_devices=True)
        return prepare(*args, **kwargs)
