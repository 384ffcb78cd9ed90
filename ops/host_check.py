"""Checks that this ComfyUI is compatible with the pack: signatures at start, a tiny layer before the first load."""

from __future__ import annotations

import inspect
import sys
from functools import cache
from typing import Any

import torch

from ..quant import QTYPES, QuantError
from .host_version import host_version
from .packed.layout import pack
from .packed.linear import GGUFOps

CALLS: dict[str, tuple[int, str]] = {
    "comfy.ops.run_every_op": (0, ""),
    "comfy.ops.cast_bias_weight": (2, "offloadable compute_dtype"),
    "comfy.ops.uncast_bias_weight": (4, ""),
    "comfy.ops._quantized_apply": (3, ""),
    "comfy.ops.manual_cast.Embedding.forward_comfy_cast_weights": (3, ""),
    "comfy.quant_ops.QuantizedTensor": (3, ""),
    "comfy.quant_ops.register_layout_class": (2, ""),
    "comfy.memory_management.TensorFileSlice": (4, ""),
    "comfy.model_prefetch.make_prefetch_queue": (3, ""),
    "comfy.model_prefetch.prefetch_queue_pop": (3, ""),
    "comfy.model_patcher.ModelPatcher.patch_weight_to_device": (6, ""),
    "comfy.model_patcher.ModelPatcher.get_combined_hook_patches": (2, ""),
    "comfy.model_patcher.ModelPatcher.partially_load": (3, ""),
    "comfy.model_patcher.ModelPatcherDynamic.restore_loaded_backups": (1, ""),
    "comfy.model_management.cast_to": (1, "dtype device"),
    "comfy.model_management.cast_to_device": (3, ""),
    "comfy.model_management.unet_dtype": (0, "supported_dtypes"),
    "comfy.model_management.unet_manual_cast": (3, ""),
    "comfy.model_management.free_memory": (2, "keep_loaded"),
    "comfy.model_management.unload_all_models": (0, ""),
    "comfy.model_management.unload_model_and_clones": (1, "all_devices"),
    "comfy.model_detection.detect_unet_config": (2, ""),
    "comfy.sd.load_diffusion_model_state_dict": (2, "metadata disable_dynamic"),
    "comfy.sd.load_text_encoder_state_dicts": (4, "disable_dynamic"),
    "comfy.lora.calculate_weight": (5, ""),
}
"""How the pack calls the host: the number of positional arguments, including `self`, and the names of the others."""

_ROWS, _COLUMNS = 32, 32
_WHAT_WORKS = "GGUF models do not load, but Convert to Quantized Model and GGUF Info work"


def incompatibilities() -> list[str]:
    """Describe each function in `CALLS` that this ComfyUI lacks, or that takes other arguments.

    Only signatures are read; nothing is imported or computed.
    """
    return [problem for name, call in CALLS.items() if (problem := _incompatibility(name, *call))]


@cache
def check_host() -> None:
    """Refuse an incompatible ComfyUI before the first load of a process.

    A tiny packed Linear and a tiny packed Embedding run in the host, as those of a model do.

    Raises:
        QuantError: the first incompatibility, the version of ComfyUI, and what works nevertheless.
    """
    problems = incompatibilities() or _failures()
    if problems:
        raise QuantError(incompatibility_message(problems))


def incompatibility_message(problems: list[str]) -> str:
    """Return the error message for these incompatibilities."""
    more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
    return (
        f"ComfyUI {host_version()} is not compatible with this WanQuant: {problems[0]}{more}; {_WHAT_WORKS};"
        " update WanQuant, or go back to the previous ComfyUI"
    )


def _incompatibility(name: str, positional: int, keywords: str) -> str:
    module = next(m for m in _prefixes(name) if m in sys.modules)
    found: Any = sys.modules[module]
    for part in name.removeprefix(module).strip(".").split("."):
        found = getattr(found, part, None)
    if found is None:
        return f"there is no {name}"
    try:
        inspect.signature(found).bind(*range(positional), **dict.fromkeys(keywords.split()))
    except TypeError as error:
        return f"{name} takes other arguments ({error})"
    return ""


def _prefixes(name: str) -> list[str]:
    """Return the prefixes of a dotted name, the longest first."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]


def _failures() -> list[str]:
    """Describe what a packed Linear and a packed Embedding compute wrongly in this host."""
    qtype = QTYPES["Q8_0"]
    dense = torch.linspace(-1, 1, _ROWS * _COLUMNS).view(_ROWS, _COLUMNS)
    blocks, bias = qtype.quantize(dense, effort="fast"), torch.linspace(0, 1, _ROWS)
    values, x = qtype.dequantize(blocks), torch.linspace(-1, 1, 2 * _COLUMNS).view(2, _COLUMNS)
    linear = GGUFOps.Linear(_COLUMNS, _ROWS, dtype=torch.float32)
    table = GGUFOps.Embedding(_ROWS, _COLUMNS, dtype=torch.float32)
    packed = pack(blocks, qtype.name, (_ROWS, _COLUMNS), torch.float32)
    index = torch.tensor([3, 0])
    try:
        linear.load_state_dict({"weight": packed, "bias": bias})
        table.load_state_dict({"weight": packed})
        with torch.inference_mode():
            product = torch.allclose(linear(x), torch.nn.functional.linear(x, values, bias), atol=1e-5)
            gathered = torch.equal(table(index, out_dtype=torch.float32), values[index])
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        return [f"a packed layer fails ({type(error).__name__}: {str(error).partition(chr(10))[0]})"]
    correct = {"the products with a packed weight": product, "the rows of a packed embedding": gathered}
    return [f"{what} differ from those of the same dense weight" for what, equal in correct.items() if not equal]
