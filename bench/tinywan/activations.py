"""What a GPU does to the inputs of layers in ComfyUI's own formats, and a CPU does only to some: it quantizes them.

On a GPU whose cores multiply in the format, ComfyUI quantizes the inputs of each layer anew in every step. Rotated
formats take one scale per token, NVFP4 one per 16 values and one for all, MXFP8 one per 32 values. FP8 has the scale 1
where the file has no `input_scale`. Everything else stays float32 here, while a GPU calculates in bfloat16 around it.

Source: forward of mixed_precision_ops in comfy/ops.py, ComfyUI 0.30.0; comfy_kitchen 0.2.40 backends/eager.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from wanquant.quant.native.registry import NATIVE
from wanquant.quant.native.rotation import rotate

Rounding = Callable[[Tensor], Tensor]
"""Takes and returns the inputs of a layer: float32, (..., columns)."""

# The format of the weight, and that of the inputs, which are encoded as weights are without any search.
_INPUTS = {"MXFP8": "MXFP8", "NVFP4": "NVFP4", "INT8": "INT8", "W4A8": "INT8", "W6A8": "INT8", "INT4": "INT4"}
_MAX_FP8 = 448.0


def rounding(name: str, factors: Tensor | None = None) -> Rounding:
    """Return what quantizes and dequantizes the inputs of a layer.

    Args:
        name: the native format of its weight.
        factors: float32 (columns,), `pre_quant_scale`, by which the inputs are multiplied before.
    """
    rounded = _fp8 if name == "FP8" else partial(_encoded, _INPUTS[name])
    return rounded if factors is None else lambda inputs: rounded(inputs * factors) / factors


def quantize_inputs(module: torch.nn.Module, roundings: Mapping[str, Rounding]) -> None:
    """Make the Linears of a module quantize their inputs, by the names of their weights."""
    for name, layer in module.named_modules():
        if rounded := roundings.get(f"{name}.weight"):
            layer.register_forward_pre_hook(lambda _, inputs, rounded=rounded: (rounded(inputs[0]),))


def _fp8(inputs: Tensor) -> Tensor:
    return inputs.clamp(-_MAX_FP8, _MAX_FP8).to(torch.float8_e4m3fn).float()


def _encoded(name: str, inputs: Tensor) -> Tensor:
    rows = inputs.flatten(0, -2)
    values = NATIVE[name].decode(NATIVE[name].encode(rows, effort="fast"), tuple(rows.shape), rotate)
    return values.view_as(inputs)
