"""The 8-bit rows of weights that are kept over a sampling, in what a budget leaves over."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import comfy.model_management
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ...quant.errors import PrintableLog
from ...quant.native.rotation import GROUP
from ...quant.plan.wan_shapes import role
from ...quant.units import GIB
from .. import host
from ..packed.int8 import Int8Ops
from ..packed.kept_rows import KeptRows, row_bytes
from ..packed.linear import packed_modules
from .automatic import automatic_budget
from .resident import unload_other_models
from .sampling_job import SamplingJob
from .simulator import Peak

logger = PrintableLog(__name__)

_OF_THE_PROMPT = re.compile(r"\.cross_attn\.[kv](_img)?\.")
"""Layers of a block that multiply the few tokens of text or picture, exactly."""


@dataclass(frozen=True)
class RowRoom:
    """The room for 8-bit rows beside all weights, and the layers to keep rows of; false if there is none."""

    layers: tuple[Int8Ops.Linear, ...]
    nbytes: int
    total_bytes: int
    """The predicted peak with all weights and these rows."""

    def __bool__(self) -> bool:
        return self.nbytes > 0

    def __str__(self) -> str:
        return (
            f"up to {self.nbytes / GIB:.2f} GiB of int8 rows are kept from step to step, for which the peak is"
            f" {self.total_bytes / GIB:.2f} GiB with all weights"
        )


def row_room(model: ModelPatcher, job: SamplingJob, peak: Peak, budget: int) -> RowRoom:
    """Return what 8-bit rows may take of a budget beside the peak and all weights of the model.

    Weights come first. A byte of them saves more time, because it needs not be moved in each step, and for most types
    fewer bytes hold a weight.

    Args:
        peak: predicted for the plan that `job` is sampled with.
        budget: in bytes; see `spendable`.
    """
    layers = tuple(_layers(model, _tokens(model, job)))
    taken = peak.total_bytes + max(model.model_size(), host.resident_bytes(model.model))
    nbytes = max(0, min(budget - taken, sum(row_bytes(*layer.weight.shape) for layer in layers)))
    return RowRoom(layers, nbytes, taken + nbytes)


def spendable(model: ModelPatcher, budget: int) -> int:
    """Return the part of a budget, in bytes, that this process can have on the device, however large the budget is."""
    return min(budget, automatic_budget(model.load_device))


def keep_rows(model: ModelPatcher, room: RowRoom, peak: Peak) -> KeptRows | None:
    """Keep the 8-bit rows of a loaded model until they are released, and log it; None if there is no room."""
    if not room:
        return None
    unload_other_models(model, room.nbytes + peak.total_bytes - peak.weight_bytes - peak.context_bytes)
    try:
        kept = KeptRows(room.nbytes, model.load_device)
    except comfy.model_management.OOM_EXCEPTION:
        logger.warning("Wan Low VRAM: %.2f GiB of int8 rows are not kept: they cannot be allocated", room.nbytes / GIB)
        return None
    kept.attach(room.layers)
    logger.info("Wan Low VRAM: %s", room)
    return kept


def _layers(model: ModelPatcher, tokens: int) -> Iterator[Int8Ops.Linear]:
    """Yield the layers that multiply this many tokens in 8-bit integers, in the order of the blocks.

    Compiled layers make their rows within their graph, which torch would compile anew for other attributes.
    """
    if model.get_wrappers(WrappersMP.APPLY_MODEL, host.COMPILE_KEY):
        return
    for key, layer in packed_modules(model.model):
        if role(key) == "embedding" or _OF_THE_PROMPT.search(key) or not isinstance(layer, Int8Ops.Linear):
            continue
        if tokens >= layer.least_tokens and layer.in_features % GROUP == 0:
            yield layer


def _tokens(model: ModelPatcher, job: SamplingJob) -> int:
    """Return the tokens of the video in one forward."""
    batch, _, frames, *size = job.latent
    cells: int = batch * min(frames, job.frames_at_a_time or frames) * math.prod(size)
    patch: tuple[int, ...] = model.model.diffusion_model.patch_size
    return cells // math.prod(patch)
