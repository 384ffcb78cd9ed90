"""The distinction between stored tensors that are weights, and scales and markers that belong to a weight.

Checkpoints that are quantized for ComfyUI store a layer as several tensors: `<layer>.weight`, its scales, and a JSON
text in `<layer>.comfy_quant` that names the format. `source_tensors` combines them to one tensor per weight.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ..errors import QuantError
from ..files.strict_json import parse_json
from ..qtype import QTYPES
from .block_scaled import fold_blocks
from .grouped import fold_affine, fold_levels
from .json_tensor import read_json
from .scaled import Layer, fold_floats, fold_int4, fold_int8
from .tensors import DTYPES, NUMBERS, PackedTensor, PlainTensor, SourceTensor, StoredTensor

QUANTIZATION_METADATA = "_quantization_metadata"

LayerFormat = dict[str, object]
"""The JSON description of a quantized layer: `format` and its options."""

_FORMATS: dict[str, Callable[[Layer], SourceTensor]] = {
    "float8_e4m3fn": fold_floats,
    "float8_e5m2": fold_floats,
    "int8_tensorwise": fold_int8,
    "convrot_w4a4": fold_int4,
    "nvfp4": fold_blocks,
    "mxfp8": fold_blocks,
    "awq_w4a16": fold_affine,
    "asym_w4a8_int8": fold_levels,
}
# The suffixes of tensors that belong to a weight. Scales of activations (input_scale) are ignored.
_COMPANIONS = re.compile(
    r"(?P<layer>.+)\."
    r"(comfy_quant|weight_scale|weight_scale_2|scale_weight|pre_quant_scale|input_scale|scale_input|weight_scale_inv"
    r"|weight_s_rel|weight_zeros|weight_s_channel|weight_codebook|weight_correction)"
)
_COMFY_QUANT = ".comfy_quant"
_UNMARKED_INT8: LayerFormat = {"format": "int8_tensorwise"}
_PARTS = ("weight_zeros", "weight_s_channel", "weight_codebook", "weight_correction")
"""The suffixes of the tensors that formats with groups have beside a scale."""
MARKER = "scaled_fp8"
"""The name of a tensor that marks a file as FP8; files from before `comfy_quant` have it. Its values are unused."""


def declared_formats(path: Path, metadata: Mapping[str, str]) -> dict[str, LayerFormat]:
    """Return the format of each layer that the metadata of a file declares.

    Raises:
        QuantError: malformed metadata.
    """
    if QUANTIZATION_METADATA not in metadata:
        return {}
    where, advice = f"{path}: metadata {QUANTIZATION_METADATA}", "the file is damaged, download it again"
    match parse_json(metadata[QUANTIZATION_METADATA], where, advice):
        case {"layers": dict(layers)} if all(isinstance(config, dict) for config in layers.values()):
            return layers
    raise QuantError(f"{where} is malformed, expected JSON with a format for each layer; {advice}")


def contradiction(stored: Sequence[StoredTensor], formats: Mapping[str, LayerFormat]) -> tuple[str, ...]:
    """Return a warning about the first layer whose marker names another format than the metadata does, if any."""
    for tensor in stored:
        layer = tensor.name.removesuffix(_COMFY_QUANT)
        declared = formats.get(layer) if layer != tensor.name else None
        marker = _marker(tensor) if declared is not None else None
        if declared is not None and marker is not None and _kind(declared) != _kind(marker):
            return (
                f"{tensor.file.path}: {layer} is {json.dumps(marker):.200} by its comfy_quant, but"
                f" {json.dumps(declared):.200} by the metadata, which counts here as in ComfyUI; if that is wrong,"
                " download the file again",
            )
    return ()


def _kind(config: LayerFormat) -> tuple[object, bool]:
    """Return the format, and whether it rotates the weight."""
    params = config.get("params")
    options = {**params, **config} if isinstance(params, dict) else config
    return options.get("format"), bool(options.get("convrot"))


def source_tensors(stored: Sequence[StoredTensor], formats: Mapping[str, LayerFormat]) -> Iterator[SourceTensor]:
    """Yield the weights among the stored tensors, in the same order.

    Args:
        stored: all tensors of the model.
        formats: the formats that the metadata declares, by layer name; other layers have a `comfy_quant` tensor.

    Raises:
        QuantError: an unsupported dtype or format, or scales that are missing or malformed.
    """
    parts = {tensor.name: tensor for tensor in stored}
    is_marked = bool(formats) or any(name.endswith(_COMFY_QUANT) for name in parts)
    for tensor in stored:
        if _COMPANIONS.fullmatch(tensor.name) or _is_marker(tensor):
            continue
        layer = _layer(tensor, parts, formats)
        if layer and is_marked and tensor.dtype == "I8" and layer.config is _UNMARKED_INT8:
            raise _error(
                tensor,
                "integers with a scale, but without the comfy_quant that other layers have, so that their format is"
                " unknown; the file is damaged, download it again",
            )
        yield _unscaled(tensor) if layer is None else _fold(layer)


def _is_marker(tensor: StoredTensor) -> bool:
    """Return whether the tensor holds no values to convert; some files mark the kind of model by an empty tensor."""
    empty = tensor.nbytes == 0 and not tensor.name.endswith((".weight", ".bias"))
    return empty or tensor.name == MARKER


def _unscaled(tensor: StoredTensor) -> SourceTensor:
    if tensor.nbytes == 0:
        raise _error(
            tensor,
            f"shape {tensor.shape} has a dimension of size 0, expected a size of at least 1;"
            " the file is damaged, download it again",
        )
    # Integers of a weight are codes of a format that is unknown here.
    if tensor.dtype in DTYPES or tensor.dtype == "F64" or (tensor.dtype in NUMBERS and tensor.name[-7:] != ".weight"):
        return PlainTensor.of(tensor)
    if tensor.dtype in QTYPES and tensor.dtype not in NUMBERS:
        return PackedTensor.of(tensor, QTYPES[tensor.dtype])
    raise _error(
        tensor,
        f"dtype {tensor.dtype} without ComfyUI's scales cannot be converted, expected {', '.join(DTYPES)};"
        " use the full-precision checkpoint",
    )


def _layer(weight: StoredTensor, parts: Mapping[str, StoredTensor], formats: Mapping[str, LayerFormat]) -> Layer | None:
    """Return the quantized layer of a weight, or None if the tensor is not a quantized weight."""
    name = weight.name.removesuffix(".weight")
    if name == weight.name:
        return None
    scales = (parts.get(f"{name}.{suffix}") for suffix in ("weight_scale", "scale_weight", "weight_s_rel"))
    scale = next((scale for scale in scales if scale is not None), None)
    config = formats.get(name, _marker(parts.get(name + _COMFY_QUANT)))
    if config is None and f"{name}.weight_scale_inv" in parts:
        raise _error(
            weight,
            "its scale is weight_scale_inv (one per block), expected weight_scale as in ComfyUI's formats;"
            " use the full-precision checkpoint",
        )
    if config is None and scale is None:
        return None
    # Scales without a marker are from before markers existed, or from lightx2v.
    config = (_UNMARKED_INT8 if weight.dtype == "I8" else {"format": "float8_e4m3fn"}) if config is None else config
    if scale is None:
        suffix = "weight_s_rel" if config.get("format") == "asym_w4a8_int8" else "weight_scale"
        raise _error(
            weight,
            f"marked as {config.get('format')!r:.40} but has no scale, expected {name}.{suffix};"
            " the file is damaged, download it again",
        )
    more = {suffix: parts[f"{name}.{suffix}"] for suffix in _PARTS if f"{name}.{suffix}" in parts}
    return Layer(weight, config, scale, parts.get(f"{name}.weight_scale_2"), parts.get(f"{name}.pre_quant_scale"), more)


def _fold(layer: Layer) -> SourceTensor:
    fold = _FORMATS.get(str(layer.config.get("format")))
    if fold is None:
        known = ", ".join(_FORMATS)
        raise layer.error(
            f"format {layer.config.get('format')!r:.40} is unknown, expected one of {known};"
            " use the full-precision checkpoint"
        )
    _check_parts(layer)
    factor = layer.input_factor
    if factor is not None and (factor.dtype not in DTYPES or len(layer.weight.shape) != 2):
        raise layer.error(
            f"pre_quant_scale is {factor.dtype} of shape {factor.shape} for a weight of shape {layer.weight.shape},"
            f" expected {', '.join(DTYPES)} for a matrix; the file is damaged, download it again"
        )
    tensor = fold(layer)
    if factor is not None and factor.shape != tensor.shape[1:]:
        raise layer.error(
            f"pre_quant_scale has shape {factor.shape}, expected {tensor.shape[1:]};"
            " the file is damaged, download it again"
        )
    return tensor


def _check_parts(layer: Layer) -> None:
    """Refuse a layer of which a tensor has no values."""
    parts = (layer.weight, layer.scale, layer.tensor_scale, layer.input_factor, *layer.parts.values())
    empty = next((part for part in parts if part is not None and part.nbytes == 0), None)
    if empty is not None or not layer.weight.shape:
        got = f"shape {layer.weight.shape}" if empty is None else f"{empty.name} has shape {empty.shape}"
        raise layer.error(
            f"{got}, expected at least 1 dimension and no size of 0; the file is damaged, download it again"
        )


def _marker(stored: StoredTensor | None) -> LayerFormat | None:
    if stored is None:
        return None
    _, marker = read_json(stored, "the JSON object that ComfyUI writes")
    if not (isinstance(marker, dict) and isinstance(marker.get("format"), str)):
        raise _error(
            stored,
            f"{marker!r:.40}, expected a JSON object with a format; the file is damaged, download it again",
        )
    return marker


def _error(tensor: StoredTensor, problem: str) -> QuantError:
    return QuantError(f"{tensor.file.path}: tensor {tensor.name}: {problem}")
