"""Which file to use for each published Wan model, and how to sample it, on a machine with some memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import comfy.model_management
import torch

from ...quant import QuantError
from ...quant.plan.advice import Advice, AdviceReport
from ...quant.plan.recipe import GGUF_RECIPES, Recipe
from ...quant.plan.wan_files import tensor_bytes
from ...quant.plan.wan_shapes import WanSize
from ...quant.qtype import QTYPES
from ...quant.units import GIB
from .choose_plan import ChosenPlan, closest_plan
from .published import PUBLISHED, PublishedModel, sampling, simulator

OTHERS_GIB = 0.5
"""Video memory that the desktop and other programs hold on the only GPU of a machine."""
RAM_BESIDE_GIB = 6.0
"""Main memory for the system, ComfyUI and the frames of a video, beside the weights."""
_MOST_BITS = "Q8_0"
_LARGEST_GIB = 65536


def advise(
    vram_gib: float = 0,
    ram_gib: float = 0,
    models: Sequence[PublishedModel] = PUBLISHED,
    done: Callable[[], None] = lambda: None,
) -> AdviceReport:
    """Return the advice for each model and each of its videos.

    Args:
        vram_gib: of the GPU, or 0 for this machine's.
        ram_gib: main memory, or 0 for this machine's.
        done: called after each model.

    Raises:
        QuantError: a memory that is none, or no GPU was found and none is given.
    """
    for name, gib in (("vram", vram_gib), ("ram", ram_gib)):
        if not (math.isfinite(gib) and 0 <= gib <= _LARGEST_GIB):
            raise QuantError(f"{name} {gib}: expected GiB, or 0 for this machine's; give a number such as 8")
    vram_gib, ram_gib = vram_gib or _vram_gib(), ram_gib or _total_gib(torch.device("cpu"))
    advice: list[Advice] = []
    for model in models:
        advice += _of_model(model, vram_gib, ram_gib)
        done()
    return AdviceReport(round(vram_gib, 2), round(ram_gib, 2), OTHERS_GIB, advice)


def advise_elsewhere(vram_gib: float, ram_gib: float) -> dict[str, Any]:
    """Return the advice as JSON, or why it was refused, for a process that is no server."""
    try:
        return advise(vram_gib, ram_gib).json()
    except QuantError as refusal:
        return {"refused": str(refusal)}


def _vram_gib() -> float:
    device: torch.device = comfy.model_management.get_torch_device()
    if device.type == "cpu":
        raise QuantError("vram 0: this machine has no GPU that PyTorch finds; give the GiB of one, such as 8")
    return _total_gib(device)


def _total_gib(device: torch.device) -> float:
    return float(comfy.model_management.get_total_memory(device)) / GIB


def _of_model(model: PublishedModel, vram_gib: float, ram_gib: float) -> Iterator[Advice]:
    recipe = largest_recipe(model.size, ram_gib)
    simulated, budget = simulator(model.size, recipe.name), max(0, round((vram_gib - OTHERS_GIB) * GIB))
    file = tensor_bytes(model.size, recipe)
    # Experts take turns: sampling one frees what ComfyUI pinned of the other, whose file stays mapped.
    ram = file / GIB + RAM_BESIDE_GIB
    for video in model.videos:
        choice = closest_plan(simulated, sampling(model.size, video), budget)
        peak = choice.peak.total_bytes
        yield Advice(
            model=model.name,
            video=video,
            files=model.files,
            recipe=recipe.name,
            file_gib=round(file / GIB, 2),
            ram_gib=_rounded_up(ram),
            vram_gib=round(peak / GIB, 2),
            budget_gib=round(budget / GIB, 2) if choice.plan else 0,
            arithmetic=round(choice.slowdown, 3),
            streamed_gib=round(max(0, file - max(0, budget - peak)) / GIB, 2),
            reason=_reason(choice, budget, ram, ram_gib),
        )


def largest_recipe(size: WanSize, ram_gib: float) -> Recipe:
    """Return the recipe with the most bits, at most those of Q8_0, of which one file fits into main memory.

    If none fits, it is the smallest. Types of small blocks, except Q8_0, are left out for their errors.
    """
    most, room = GGUF_RECIPES[_MOST_BITS], (ram_gib - RAM_BESIDE_GIB) * GIB
    if tensor_bytes(size, most) <= room:
        return most
    found = [each for each in GGUF_RECIPES.values() if not each.experimental and QTYPES[each.base].block_size == 256]
    by_size = sorted((tensor_bytes(size, recipe), recipe.name) for recipe in found)
    fitting = [name for nbytes, name in by_size if nbytes <= room]
    return GGUF_RECIPES[fitting[-1] if fitting else by_size[0][1]]


def _reason(choice: ChosenPlan, budget: int, ram: float, ram_gib: float) -> str:
    peak, missing = choice.peak.total_bytes, []
    if ram > ram_gib:
        missing.append(f"{_rounded_up(ram):g} GiB of main memory")
    if peak > budget:
        missing.append(f"a GPU of {_rounded_up(peak / GIB + OTHERS_GIB):g} GiB, or a smaller video")
    return f"needs {' and '.join(missing)}" if missing else ""


def _rounded_up(gib: float) -> float:
    return math.ceil(10 * gib) / 10
