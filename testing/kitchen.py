"""Weights as comfy-kitchen itself encodes them: the reference of the native formats in tests and benchmarks."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

_LAYOUTS: dict[str, tuple[str, dict[str, object]]] = {
    "FP8": ("TensorCoreFP8Layout", {}),
    "MXFP8": ("TensorCoreMXFP8Layout", {}),
    "NVFP4": ("TensorCoreNVFP4Layout", {}),
    "INT8": ("TensorWiseINT8Layout", {"per_channel": True, "convrot": True}),
    "INT4": ("TensorCoreConvRotW4A4Layout", {}),
    "W4A8": ("AsymW4A8Int8Layout", {}),
    "W4A8_G32": ("AsymW4A8Int8Layout", {"group_size": 32}),
    "W6A8": ("AsymW4A8Int8Layout", {"bits": 6}),
}


class MissingLayoutError(LookupError):
    """The installed comfy-kitchen is too old for a format."""


def layout(name: str) -> Any:
    """Return a layout of kitchen's.

    Raises:
        MissingLayoutError: the installed one lacks it.
    """
    found = getattr(importlib.import_module("comfy_kitchen.tensor"), name, None)
    if found is None:
        raise MissingLayoutError(f"this comfy-kitchen has no {name}")
    return found


def encoder(name: str) -> tuple[Any, dict[str, object]]:
    """Return the layout of kitchen's that encodes a native format, and the options of its `quantize`.

    Raises:
        MissingLayoutError: the installed kitchen lacks the layout.
    """
    class_name, options = _LAYOUTS[name]
    return layout(class_name), options


def kitchen_values(name: str, weight: Tensor) -> Tensor:
    """Return what kitchen makes of a weight, float32 (rows, columns), by encoding and decoding it.

    Args:
        name: of a native format.

    Raises:
        MissingLayoutError: the installed kitchen lacks the format.
    """
    cls, options = encoder(name)
    try:
        values: Tensor = cls.dequantize(*cls.quantize(weight, **options))
    except (TypeError, ValueError) as error:
        if name != "W6A8":
            raise
        raise MissingLayoutError(f"this comfy-kitchen has no 6 bits: {error}") from error
    return values[: weight.shape[0], : weight.shape[1]]
