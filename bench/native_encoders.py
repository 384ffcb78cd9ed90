"""Speed, error and memory of the encoders of ComfyUI's own formats beside comfy-kitchen's; shared by `convert`."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from ..quant.conversion.layer_encoder import LayerEncoder
from ..quant.native.layer_type import LayerType
from ..quant.native.registry import NATIVE
from ..testing.kitchen import MissingLayoutError, encoder
from . import harness
from .harness import Row


def native_rows(shape: tuple[int, int]) -> list[Row]:
    """Measure every format on Gaussian weights of a shape, in one thread."""
    harness.import_comfyui()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    weight = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rows = [_row(name, weight) for name in NATIVE]
    torch.set_num_threads(threads)
    return rows


def _row(name: str, weight: Tensor) -> Row:
    """Return millions of weights per second, relative errors, and the most bytes of tensors at once.

    Each error is |decoded - weight| / |weight|. In a file, the gain of rows is restored, which costs a little. The
    row lacks what kitchen lacks.
    """
    from ..ops.budget.live_memory import LiveMemory  # which imports ComfyUI

    layer = LayerType(NATIVE[name], (weight.shape[0], weight.shape[1]))
    encoders = {effort: lambda effort=effort: layer.quantize(weight, effort=effort) for effort in ("fast", "best")}
    decode = dict.fromkeys(encoders, layer.dequantize)
    if (found := _kitchen(name)) is not None:
        cls, options = found
        encoders["kitchen"] = lambda: cls.quantize(weight, **options)
        decode["kitchen"] = lambda parts: cls.dequantize(*parts)[: weight.shape[0], : weight.shape[1]]
    times = harness.fastest(1, *encoders.values(), clock=time.process_time)
    row: Row = {"format": name, "bits": round(layer.bits_per_weight, 3)}
    for (each, encode), ms in zip(encoders.items(), times, strict=True):
        row[f"{each}_mws"] = round(weight.numel() / ms / 1e3, 1)
        with LiveMemory("cpu") as live:
            parts = encode()
        row[f"{each}_peak_mib"] = round(live.peak.nbytes / 2**20)
        row[f"{each}_error"] = _error(decode[each](parts), weight)
    row["file_error"] = _error(layer.dequantize(LayerEncoder().quantize(layer, weight)), weight)
    return row


def _error(values: Tensor, weight: Tensor) -> float:
    return round(float((values - weight).norm() / weight.norm()), 5)


def _kitchen(name: str) -> tuple[Any, dict[str, Any]] | None:
    """Return a layout of kitchen's and its options, or None if the installed one lacks it."""
    try:
        cls, options = encoder(name)
        cls.quantize(torch.ones(16, 256), **options)
    except (ImportError, MissingLayoutError, TypeError, ValueError):
        return None
    return cls, options
