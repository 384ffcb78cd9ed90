"""Two models that are never in memory together, as the high-noise and the low-noise expert of Wan 2.2 need not be."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import comfy.model_management
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP


def share_memory(first: ModelPatcher, second: ModelPatcher) -> None:
    """Give both one place in memory: the one that is sampled takes it, and the other goes back to its file.

    The host unloads a model only when it reckons that memory is short, and then perhaps a part of it. Here the place is
    free before it makes its plan for the next, so that a plan for the larger of both holds for either. Clones, and
    so the models that LoRA loaders and other nodes make of them, belong to it too.
    """
    for patcher, other in ((first, second), (second, first)):
        patcher.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, __name__, _Eviction(other))


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
