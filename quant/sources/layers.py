"""Finds which stored tensors are weights and which are scales and markers of another one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ..errors import QuantError
from ..qtype import QTYPES
from .kitchen import fold_blocks, fold_int4
from .scaled import Layer, fold_floats, fold_int8
from .tensors import DTYPES, PackedTensor, PlainTensor, SourceTensor, StoredTensor

QUANTIZATION_METADATA = "_quantization_metadata"

LayerFormat = dict[str, object]
"""What a file says of a quantized layer: `format` and its options."""

_FORMATS: dict[str, Callable[[Layer], SourceTensor]] = {
    "float8_e4m3fn": fold_floats,
    "float8_e5m2": fold_floats,
    "int8_tensorwise": fold_int8,
    "convrot_w4a4": fold_int4,
    "nvfp4": fold_blocks,
    "mxfp8": fold_blocks,
}
# The scales of activations are of no use to a weight.
_COMPANIONS = re.compile(
    r"(?P<layer>.+)\."
    r"(comfy_quant|weight_scale|weight_scale_2|scale_weight|pre_quant_scale|input_scale|scale_input|weight_scale_inv)"
)
MARKER = "scaled_fp8"
"""A tensor without meaning of its own, in files of the time before `comfy_quant`."""


def declared_formats(path: Path, metadata: Mapping[str, str]) -> dict[str, LayerFormat]:
    """Formats by layer, from a file's metadata."""
    if QUANTIZATION_METADATA not in metadata:
        return {}
    try:
        layers = json.loads(metadata[QUANTIZATION_METADATA])["layers"]
        return {str(name): dict(config) for name, config in layers.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise QuantError(f"{path}: metadata {QUANTIZATION_METADATA} is malformed; the file is damaged") from error


def source_tensors(stored: Sequence[StoredTensor], formats: Mapping[str, LayerFormat]) -> Iterator[SourceTensor]:
    """The weights among `stored`, in their order.

    Args:
        formats: by layer, where they are not given by markers.

    Raises:
        QuantError: a type or format that cannot be read, or scales that are missing or unknown.
    """
    parts = {tensor.name: tensor for tensor in stored}
    for tensor in stored:
        if _COMPANIONS.fullmatch(tensor.name) or _is_marker(tensor):
            continue
        layer = _layer(tensor, parts, formats)
        yield _unscaled(tensor) if layer is None else _fold(layer)


def _is_marker(tensor: StoredTensor) -> bool:
    """Whether the name is all that the tensor tells: some makers note the kind of model with one that is empty."""
    empty = tensor.nbytes == 0 and not tensor.name.endswith((".weight", ".bias"))
    return empty or tensor.name == MARKER


def _unscaled(tensor: StoredTensor) -> SourceTensor:
    if tensor.nbytes == 0:
        raise _error(tensor, f"shape {tensor.shape} has a dimension of size 0; the file is damaged")
    if tensor.dtype in DTYPES:
        return PlainTensor.of(tensor)
    if tensor.dtype in QTYPES:
        return PackedTensor.of(tensor, QTYPES[tensor.dtype])
    raise _error(
        tensor,
        f"dtype {tensor.dtype} without ComfyUI's scales cannot be converted, only {', '.join(DTYPES)};"
        " use the full-precision checkpoint",
    )


def _layer(weight: StoredTensor, parts: Mapping[str, StoredTensor], formats: Mapping[str, LayerFormat]) -> Layer | None:
    """The layer that the tensor is the scaled weight of, if it is one."""
    name = weight.name.removesuffix(".weight")
    if name == weight.name:
        return None
    scale = parts.get(f"{name}.weight_scale", parts.get(f"{name}.scale_weight"))
    config = formats.get(name, _marker(parts.get(f"{name}.comfy_quant")))
    if config is None and f"{name}.weight_scale_inv" in parts:
        raise _error(weight, "scaled in blocks by weight_scale_inv, not as ComfyUI does; use another checkpoint")
    if config is None and scale is None:
        return None
    # What has scales but no marker is of the time before markers, when there was FP8 only.
    config = {"format": "float8_e4m3fn"} if config is None else config
    if scale is None:
        raise _error(weight, f"marked as {config.get('format')!r:.40} but has no scale; the file is damaged")
    return Layer(weight, config, scale, parts.get(f"{name}.weight_scale_2"), parts.get(f"{name}.pre_quant_scale"))


def _fold(layer: Layer) -> SourceTensor:
    fold = _FORMATS.get(str(layer.config.get("format")))
    if fold is None:
        known = ", ".join(_FORMATS)
        raise layer.error(f"format {layer.config.get('format')!r:.40} is unknown, only {known}; use another checkpoint")
    factor = layer.input_factor
    if factor is not None and (factor.dtype not in DTYPES or len(layer.weight.shape) != 2):
        raise layer.error(f"pre_quant_scale is {factor.dtype} of shape {factor.shape}; the file is damaged")
    tensor = fold(layer)
    if factor is not None and factor.shape != tensor.shape[1:]:
        raise layer.error(f"pre_quant_scale has shape {factor.shape}, expected {tensor.shape[1:]}")
    return tensor


def _marker(stored: StoredTensor | None) -> LayerFormat | None:
    if stored is None:
        return None
    try:
        return dict(json.loads(stored.peek().numpy().tobytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise _error(stored, "not the JSON table that ComfyUI writes; the file is damaged") from error


def _error(tensor: StoredTensor, problem: str) -> QuantError:
    return QuantError(f"{tensor.file.path}: tensor {tensor.name}: {problem}")
