"""The seconds that a step of the sampler took, once one was measured in this process on its device."""

from __future__ import annotations

import time
from collections.abc import Hashable

from comfy.model_patcher import ModelPatcher

from ..lean import MemoryPlan

_seconds: dict[Hashable, float] = {}


class StepClock:
    """Measures the time from the start of the first step to the start of the last one of a sampling."""

    def __init__(self) -> None:
        self._starts: list[float] = []

    def step(self) -> None:
        """Note that a step starts."""
        self._starts.append(time.perf_counter())

    def keep(self, key: Hashable) -> None:
        """Remember the mean seconds of a step for `key`, if there were two or more."""
        if len(self._starts) > 1:
            _seconds[key] = (self._starts[-1] - self._starts[0]) / (len(self._starts) - 1)


def step_key(model: ModelPatcher, latent: tuple[int, ...], plan: MemoryPlan | None) -> Hashable:
    """Return what the time of a step depends on, of a latent (batch, channels, frames, height, width)."""
    operations = str(getattr(model.model.model_config, "custom_operations", None))
    return type(model.model).__name__, model.model_size(), operations, str(model.load_device), latent, plan


def measured_step(key: Hashable) -> str:
    """Return the seconds of a step as text, "" if none was measured."""
    return f"; a step took {_seconds[key]:.3g} s here" if key in _seconds else ""
