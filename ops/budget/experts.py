"""Two models that take turns in memory, such as the high-noise and the low-noise expert of Wan 2.2."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import comfy.model_management
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ..lean import MemoryPlan
from .sampling_job import SamplingJob
from .simulator import Peak, Simulator


def share_memory(first: ModelPatcher, second: ModelPatcher) -> None:
    """Make each model unload the other from memory before it is sampled.

    ComfyUI unloads a model only if it estimates that memory is short, and then perhaps only a part of it. Sharing makes
    one memory plan, that of the larger model, valid for both. Clones, such as LoRA loaders make, share the memory too.
    """
    shared = _SharedMemory(first, second)
    for patcher, other in ((first, second), (second, first)):
        patcher.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, __name__, _UnloadOther(other))
        patcher.set_attachments(__name__, shared)


def simulator_for(patcher: ModelPatcher) -> Simulator:
    """Return a simulator of a loaded MODEL with its LoRAs.

    If it shares its memory with another model, the simulator predicts the larger peak of the two.
    """
    shared: _SharedMemory | None = patcher.get_attachment(__name__)
    if shared is None:
        return Simulator.from_patcher(patcher)
    return LargerPeakSimulator([Simulator.from_patcher(each) for each in shared.with_other(patcher)])


class LargerPeakSimulator(Simulator):
    """Simulators of models that are sampled with one plan: predicts the largest of their peaks."""

    def __init__(self, simulators: list[Simulator]) -> None:
        self._simulators = simulators
        self.weight_elements = simulators[0].weight_elements

    @property
    def heads(self) -> int:
        return self._simulators[0].heads

    def peak(self, job: SamplingJob, plan: MemoryPlan | None) -> Peak:
        peaks = (simulator.peak(job, plan) for simulator in self._simulators)
        return max(peaks, key=lambda peak: peak.total_bytes)


class _SharedMemory:
    """Two models that share memory, each as the clone that was simulated last and so has the LoRAs to sample with."""

    def __init__(self, *patchers: ModelPatcher) -> None:
        # Strong references would form cycles, which only the garbage collector frees.
        self._first = [weakref.ref(patcher) for patcher in patchers]
        self._latest = list(self._first)

    def with_other(self, patcher: ModelPatcher) -> list[ModelPatcher]:
        """Return `patcher`, and the other model unless it is gone; remember `patcher` as the latest clone."""
        others = []
        for index, (first, latest) in enumerate(zip(self._first, self._latest, strict=True)):
            known = latest() or first()
            if known is not None and known.is_clone(patcher):
                self._latest[index] = weakref.ref(patcher)
            elif known is not None:
                others.append(known)
        return [patcher, *others]


class _UnloadOther:
    """A wrapper that unloads the other model from all devices and from pinned memory before ComfyUI loads this one."""

    def __init__(self, other: ModelPatcher) -> None:
        # A strong reference would form a cycle, which only the garbage collector frees.
        self._other = weakref.ref(other)

    def __call__(self, prepare: Callable[..., Any], *args: object, **kwargs: object) -> Any:  # noqa: ANN401
        other = self._other()
        if other is not None:
            comfy.model_management.unload_model_and_clones(other, all_devices=True)
        return prepare(*args, **kwargs)
