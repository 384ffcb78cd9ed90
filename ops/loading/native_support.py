"""Which of ComfyUI's own formats this host can use, by what it and its comfy-kitchen have, and which one has others."""

from __future__ import annotations

from functools import cache
from typing import Any

import comfy.quant_ops
import torch

from ...quant.native.layer_type import type_name
from ...quant.native.registry import FIRST_HOST, NATIVE
from ...quant.safetensors.header import NativeHeader
from ..host_version import host_version

_SIX_BITS = "W6A8"
# The first ComfyUI with a format; all that the pack supports have the others. Source: its release notes, pull request
# 14859 for INT4, and for 6 bits the first comfy-kitchen with them, which came with about this ComfyUI.
SINCE = {name: f"{major}.{minor}" for name, (major, minor) in FIRST_HOST.items() if name not in ("FP8", "NVFP4")}
"""The first ComfyUI that uses a native format, for those that some supported ones lack."""
_SIX_BIT_KITCHEN = "0.2.36"

_FORMATS = {type_name(native): str(native.config["format"]) for native in NATIVE.values()}
_RECIPES = {type_name(native): name for name, native in NATIVE.items()}


def problems(header: NativeHeader) -> list[str]:
    """Return why this host cannot use a safetensors file, a sentence for each format, without full stops.

    Formats that have no recipe count too.
    """
    stored = {record.stored for record in header.tensors.values()} & _FORMATS.keys()
    others = header.formats - {_FORMATS[name] for name in stored}
    found = [problem(_RECIPES[name]) for name in sorted(stored)]
    return [*filter(None, found), *(_unknown(name) for name in sorted(others) if not _has_layout(name))]


def problem(recipe: str) -> str | None:
    """Return why this host cannot use files of a native recipe and which one can, without a full stop, or None."""
    format_name = str(NATIVE[recipe].config["format"])
    if not _has_layout(format_name):
        return _cannot(recipe, format_name, f"update ComfyUI to {SINCE.get(recipe, '0.24')} or newer")
    if recipe == _SIX_BITS and not _has_six_bits():
        return (
            f"{recipe} ({format_name}, 6 bits) loads in this ComfyUI {host_version()}, and then fails at its first use;"
            f" update ComfyUI to {SINCE[recipe]} or newer, or its package comfy-kitchen to {_SIX_BIT_KITCHEN}"
        )
    return None


def lacking() -> list[str]:
    """Return the native recipes whose files this host cannot use."""
    return [recipe for recipe in NATIVE if problem(recipe)]


def _unknown(format_name: str) -> str:
    return _cannot(format_name, "", "update ComfyUI")


def _cannot(name: str, format_name: str, remedy: str) -> str:
    what = f"{name} ({format_name})" if format_name else name
    return f"{what} does not load in this ComfyUI {host_version()}; {remedy}"


def _algorithms() -> dict[str, dict[str, Any]]:
    return getattr(comfy.quant_ops, "QUANT_ALGOS", {})


def _layout(format_name: str) -> Any:  # noqa: ANN401
    """Return the host's class for a format, or None; without comfy-kitchen it has none of those that it names."""
    name = _algorithms().get(format_name, {}).get("comfy_tensor_layout", "")
    try:
        return comfy.quant_ops.get_layout_class(name)
    except KeyError:
        return None


def _has_layout(format_name: str) -> bool:
    return _layout(format_name) is not None


@cache
def _has_six_bits() -> bool:
    """Return whether the host's layout decodes a small weight; one for 4 bits alone takes it for a wrong shape."""
    parts = NATIVE[_SIX_BITS].encode(torch.zeros(1, 256))
    layout = _layout(str(NATIVE[_SIX_BITS].config["format"]))
    scales = {"scale": parts["weight_s_rel"], "s_channel": parts["weight_s_channel"], "codebook": None}
    groups = {"group_size": 16, "convrot_groupsize": 256}
    try:
        params = layout.Params(orig_dtype=torch.float32, orig_shape=(1, 256), **scales, **groups)
        layout.dequantize(parts["weight"], params)
    except ValueError:
        return False
    return True
