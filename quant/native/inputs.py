"""The inputs of a layer as ComfyUI's kernels quantize them before they multiply them with its weight.

Source: forward of mixed_precision_ops in comfy/ops.py, ComfyUI 0.30.0; comfy_kitchen 0.2.40 backends/eager.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .float8 import FP8
from .levels import LevelsFormat
from .native_format import NativeFormat
from .registry import NATIVE
from .rotation import rotate

_MAX_FP8 = 448.0


def rounded_inputs(native: NativeFormat, inputs: Tensor) -> Tensor:
    """Quantize and dequantize the inputs of a layer whose weight has this format.

    FP8 without `input_scale` has the scale 1. The others encode inputs as kitchen encodes rows of a weight: rotated
    formats with one scale per token, W4A8 and W6A8 in 8 bits.

    Args:
        inputs: float32, (tokens, columns).

    Returns:
        float32, (tokens, columns).
    """
    if isinstance(native, FP8):
        return inputs.clamp(-_MAX_FP8, _MAX_FP8).to(torch.float8_e4m3fn).float()
    rows = NATIVE["INT8"] if isinstance(native, LevelsFormat) else native
    return rows.decode(rows.encode(inputs, effort="fast"), tuple(inputs.shape), rotate)
