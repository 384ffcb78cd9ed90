"""The seam to ComfyUI's products in its own quantized formats: private names that `host` does not use.

A layer with such a weight decides in its forward how it multiplies: whether it quantizes its input, and with which
scale. `with_tensors` returns a copy of the layer around other tensors, so that this decision stays ComfyUI's.

Source: comfy/ops.py mixed_precision_ops and comfy/quant_ops.py QUANT_ALGOS, ComfyUI 0.24 to 0.33; comfy-kitchen 0.2.40.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import comfy.ldm.modules.attention
import comfy.ops
import comfy.quant_ops
import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor

from ..quant.device import is_hopper

# Formats in which the product of one token does not depend on the other tokens.
_BY_TOKEN = ("float8_e4m3fn", "float8_e5m2", "mxfp8", "int8_tensorwise", "convrot_w4a4", "asym_w4a8_int8")
# Formats whose input has a scale for all tokens, unless the file has one.
_BY_TENSOR = ("nvfp4",)

# The number of rows at whose multiples a weight can be cut, and its parts with a row for each output channel.
# Block scales are stored in tiles of 128 rows: https://docs.nvidia.com/cuda/cublas/#d-block-scaling-factors-layout.
_ROWS: dict[str, tuple[int, tuple[str, ...]]] = {
    "TensorCoreFP8Layout": (1, ("scale",)),
    "TensorCoreFP8E4M3Layout": (1, ("scale",)),
    "TensorCoreFP8E5M2Layout": (1, ("scale",)),
    "TensorCoreMXFP8Layout": (128, ("scale",)),
    "TensorCoreNVFP4Layout": (128, ("block_scale",)),
    "TensorWiseINT8Layout": (1, ("scale",)),
    "TensorCoreConvRotW4A4Layout": (1, ("scale",)),
    "AsymW4A8Int8Layout": (1, ("scale", "s_channel")),
}

# Layouts whose product takes a plain input and quantizes it, token by token.
_QUANTIZE_TOKENS = ("TensorWiseINT8Layout", "TensorCoreConvRotW4A4Layout", "AsymW4A8Int8Layout")


def can_be_quantized(layer: Any) -> bool:  # noqa: ANN401
    """Return whether a layer is of the host's class for weights in its own quantized formats."""
    return hasattr(layer, "_full_precision_mm")


def format_of(layer: Any) -> str:  # noqa: ANN401
    """Return the host's name of the format of a layer's weight, "" for a plain weight."""
    weight: object = getattr(layer, "weight", None)
    return str(getattr(layer, "quant_format", "")) if isinstance(weight, QuantizedTensor) else ""


def multiplies_quantized(layer: Any) -> bool:  # noqa: ANN401
    """Return whether the layer's forward multiplies with the quantized weight, which need not be known here."""
    if not format_of(layer) or not can_be_quantized(layer) or getattr(layer, "comfy_force_cast_weights", False):
        return False
    # Patches are applied to a dequantized weight. Formats that quantize only the weight ignore `_full_precision_mm`.
    patched = len(layer.weight_function) > 0 or len(layer.bias_function) > 0
    return not (patched or (layer._full_precision_mm and _quantizes_input(layer)))


def multiplies_by_token(layer: Any) -> bool:  # noqa: ANN401
    """Return whether the product of `multiplies_quantized` is the same for a chunk of tokens as for all of them."""
    known = format_of(layer) in _BY_TOKEN or (format_of(layer) in _BY_TENSOR and _has_input_scale(layer))
    return known and multiplies_quantized(layer)


def needs_input_maximum(layer: Any) -> bool:  # noqa: ANN401
    """Return whether a chunk of tokens is multiplied as all of them are only with a scale from all of them."""
    return format_of(layer) in _BY_TENSOR and not _has_input_scale(layer) and multiplies_quantized(layer)


def _quantizes_input(layer: Any) -> bool:  # noqa: ANN401
    quantizes: bool = comfy.quant_ops.QUANT_ALGOS.get(format_of(layer), {}).get("quantize_input", True)
    return quantizes


def _has_input_scale(layer: Any) -> bool:  # noqa: ANN401
    return getattr(layer, "input_scale", None) is not None


def smoothed(layer: torch.nn.Module, x: Tensor) -> Tensor:
    """Return what the layer quantizes if it is called with x, floating point, (..., in_features)."""
    scale = getattr(layer, "pre_quant_scale", None)
    return x if scale is None else x * scale.to(x.device, x.dtype)


def measured_scale(layer: torch.nn.Module, maximum: Tensor) -> Tensor:
    """Return the scale that the layer would use for an input with this largest absolute value, a float32 scalar.

    Args:
        maximum: a scalar in the dtype of the input.
    """
    # A tile of the size that needs no padding, with the same maximum: its scale is the layer's own.
    tile = maximum.reshape(1, 1).expand(16, 16).contiguous()
    quantized = QuantizedTensor.from_float(tile, layer.layout_type)
    scale: Tensor = quantized._params.scale
    return scale


def cast_quantized(layer: torch.nn.Module, like: Tensor) -> tuple[Tensor, Tensor | None, Any]:
    """Bring a quantized weight and the bias to the device of `like` as the layer does, without dequantizing.

    Returns:
        The weight, (out_features, in_features), quantized unless the host patches it here. The bias in the dtype of
        `like`, (out_features,). The handle for `host.uncast`.
    """
    weight, bias, handle = comfy.ops.cast_bias_weight(
        layer,
        dtype=layer.weight.dtype,
        device=like.device,
        bias_dtype=like.dtype,
        offloadable=True,
        compute_dtype=like.dtype,
        want_requant=True,
    )
    return weight, bias, handle


def with_tensors(layer: Any, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> torch.nn.Module:  # noqa: ANN401
    """Return a layer that multiplies as `layer` does, with tensors that are cast and patched already.

    Args:
        layer: of the class for which `can_be_quantized` is true. It does not change.
        weight: (some output channels, in_features), quantized, or of any floating-point dtype.
        bias: floating point, (the same output channels,).
        scale: of the input, float32, (); by default the layer's own.
    """
    held: torch.nn.Module = copy.copy(layer)
    attributes = vars(held)
    for name in ("_v", "_prefetch", "weight_lowvram_function", "bias_lowvram_function"):
        attributes.pop(name, None)
    attributes.update(weight=weight, bias=bias, weight_function=[], bias_function=[])
    if scale is not None:
        attributes["input_scale"] = scale
    if not isinstance(weight, QuantizedTensor):
        attributes["comfy_force_cast_weights"] = True  # or the layer would quantize its input
    return held


def without_pages(layer: torch.nn.Linear) -> torch.nn.Linear:
    """Return a copy of a layer, around the same tensors, that runs on the CPU with its patches.

    The host leaves patches out where it casts a weight of dynamic VRAM for the CPU. The copy is as in its legacy mode.

    Source: comfy/ops.py cast_bias_weight, ComfyUI 0.24.0 to 0.30.0.
    """
    held = copy.copy(layer)
    attributes = vars(held)
    for name in ("_v", "_prefetch"):
        attributes.pop(name, None)
    for name in ("weight", "bias"):
        patch = attributes.pop(f"{name}_lowvram_function", None)
        functions = getattr(layer, f"{name}_function", [])
        attributes[f"{name}_function"] = [patch, *functions] if patch else functions
    return held


def rows(weight: Any, start: int, stop: int) -> Tensor | None:  # noqa: ANN401
    """Return rows of a quantized weight, or None where it cannot be cut there.

    Args:
        weight: of any quantized dtype, (out_features, in_features).
        start: the first row.
        stop: the row after the last one.
    """
    multiple, fields = _ROWS.get(weight._layout_cls, (0, ()))
    params, count = weight._params, weight.shape[0]
    # Forms of a weight that are cut otherwise: transposed, packed for one kernel, or with a part in another order.
    special = getattr(params, "transposed", False) or getattr(params, "mma_packed", False)
    special = special or getattr(params, "correction", None) is not None
    if not multiple or special or start % multiple or (stop % multiple and stop != count):
        return None
    cut = {name: part[start:stop] for name in fields if (part := getattr(params, name)).numel() > 1}
    shape = (stop - start, *params.orig_shape[1:])
    params = dataclasses.replace(params, orig_shape=shape, **cut)
    quantized: Tensor = QuantizedTensor(weight._qdata[start:stop], weight._layout_cls, params)
    return quantized


def workspace_bytes(x: Tensor, weight: Any) -> int:  # noqa: ANN401
    """Return the bytes that a product needs on a GPU besides its input, weight and output.

    Args:
        x: floating point, (tokens, in_features).
        weight: quantized, (in_features, out_features) or (out_features, in_features).

    Source: comfy-kitchen 0.2.40, backends/cuda/__init__.py int8_linear, w4a8_int8_linear.
    """
    if weight._layout_cls not in _QUANTIZE_TOKENS:
        return int(weight.numel()) * x.itemsize  # dequantized
    tokens = x.numel() + x.shape[0] * torch.float32.itemsize
    # A weight of fewer bits becomes 8-bit integers, at most all of it at once.
    decoded = int(weight.numel()) if weight._qdata.nbytes < weight.numel() else 0
    return tokens + decoded


def int8_backend(device: torch.device) -> str:
    """Return the name of the backend with which comfy-kitchen multiplies 8-bit integers on `device`, "" for none.

    Its eager backend, of torch's operations, does not count.

    Source: comfy_kitchen/registry.py get_capable_backend, comfy-kitchen 0.2.10 to 0.2.40.
    """
    from comfy_kitchen.exceptions import NoCapableBackendError
    from comfy_kitchen.registry import registry

    x = torch.zeros(1024, 1024, device=device, dtype=torch.float16)
    codes, scales = torch.zeros_like(x, dtype=torch.int8), torch.ones(1024, 1, device=device)
    call = {"x": x, "weight": codes, "weight_scale": scales, "bias": None, "out_dtype": x.dtype}
    try:
        backend: str = registry.get_capable_backend("int8_linear", call | {"convrot": True, "convrot_groupsize": 256})
    except NoCapableBackendError:
        return ""
    return "" if backend == "eager" else backend


def int8_can_be_faster(device: torch.device) -> bool:
    """Return whether comfy-kitchen's 8-bit products can be faster than 16-bit ones on `device`, by its kind.

    On an H100, a step in int8 takes 0.98 to 1.04 times as long as an exact one (bench/results/gpu-step-h100.json).
    """
    return not is_hopper(device)


def attends_in_8_bits() -> bool:
    """Return whether the attention that the host was started with quantizes queries, keys and values."""
    functions = vars(comfy.ldm.modules.attention)
    eight_bit = (value for name, value in functions.items() if "sage" in name or "int8" in name)
    return any(functions["optimized_attention"] is function for function in eight_bit)
