"""What a GPU does to the inputs of layers in ComfyUI's own formats, and a CPU does only to some: it quantizes them.

On a GPU whose cores multiply in the format, ComfyUI quantizes the inputs of each layer anew in every step. Rotated
formats take one scale per token, NVFP4 one per 16 values and one for all, MXFP8 one per 32 values. FP8 has the scale 1
where the file has no `input_scale`. Everything else stays float32 here, while a GPU calculates in bfloat16 around it.

Source: forward of mixed_precision_ops in comfy/ops.py, ComfyUI 0.30.0; comfy_kitchen 0.2.40 backends/eager.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from wanquant.quant.native.inputs import rounded_inputs
from wanquant.quant.native.registry import NATIVE

Rounding = Callable[[Tensor], Tensor]
"""Takes and returns the inputs of a layer: float32, (..., columns)."""


def rounding(name: str, factors: Tensor | None = None) -> Rounding:
    """Return what quantizes and dequantizes the inputs of a layer.

    Args:
        name: the native format of its weight.
        factors: float32 (columns,), `pre_quant_scale`, by which the inputs are multiplied before.
    """

    def rounded(inputs: Tensor) -> Tensor:
        return rounded_inputs(NATIVE[name], inputs.flatten(0, -2)).view_as(inputs)

    return rounded if factors is None else lambda inputs: rounded(inputs * factors) / factors


def quantize_inputs(module: torch.nn.Module, roundings: Mapping[str, Rounding]) -> None:
    """Make the Linears of a module quantize their inputs, by the names of their weights."""
    for name, layer in module.named_modules():
        if rounded := roundings.get(f"{name}.weight"):
            layer.register_forward_pre_hook(lambda _, inputs, rounded=rounded: (rounded(inputs[0]),))
