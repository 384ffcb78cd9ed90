"""The header of a safetensors file, read as what it says about a model: its tensors, quantized layers as one each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..files.safetensors_header import TensorEntry, read_safetensors_header
from ..gguf.header import Header, read_header
from ..native.layer_type import type_name
from ..native.registry import NATIVE
from .metadata import from_text

_MARKER, _WEIGHT = "comfy_quant", "weight"
_MOST_MARKER_BYTES = 1 << 12
# W4A8 and W6A8 have the same name in their markers. They differ in the bytes of a row, and in the size of the groups.
_LEVELS, _USUAL_GROUP = "asym_w4a8_int8", 16
_NAMES = {str(native.config["format"]): type_name(native) for native in NATIVE.values()}
_CODES_A_BYTE = {"INT4": 2, "NVFP4 (ComfyUI)": 2}


@dataclass(frozen=True)
class NativeRecord:
    """A tensor of a model in a safetensors file."""

    name: str
    stored: str
    """The name of its type: a native format, or a dtype of safetensors."""
    shape: tuple[int, ...]
    nbytes: int
    """The bytes of all its parts."""


@dataclass(frozen=True)
class NativeHeader:
    """The metadata and the tensors of a safetensors file."""

    path: Path
    metadata: Mapping[str, Any]
    """The metadata of a conversion, as that of a GGUF; other keys have the text of the file."""
    tensors: Mapping[str, NativeRecord]
    size: int
    """The bytes of the file."""
    data_start: int
    """The bytes in front of the tensors."""
    formats: frozenset[str] = frozenset()
    """The formats that the markers of layers name."""
    unreadable: tuple[str, ...] = ()
    """The names of markers that name no format."""


AnyHeader = Header | NativeHeader


def read_any_header(path: str | Path) -> AnyHeader:
    """Return what the header of a GGUF or safetensors file says; the suffix of the name tells which it is.

    Raises:
        QuantError: not a well-formed file.
    """
    return read_native_header(path) if Path(path).suffix.lower() == ".safetensors" else read_header(path)


def read_native_header(path: str | Path) -> NativeHeader:
    """Return what the header of a safetensors file says.

    Raises:
        QuantError: not a well-formed safetensors file.
    """
    path = Path(path)
    text, entries = read_safetensors_header(path)
    markers = {entry.name.removesuffix(_MARKER): entry for entry in entries if entry.name.endswith(f".{_MARKER}")}
    groups: dict[str, list[TensorEntry]] = {}
    for entry in entries:
        layer = entry.name[: entry.name.rfind(".") + 1]
        is_part = layer in markers and entry.name != f"{layer}bias"
        groups.setdefault(f"{layer}{_WEIGHT}" if is_part else entry.name, []).append(entry)
    with path.open("rb") as file:
        configs = {f"{layer}{_WEIGHT}": _format(file, marker) for layer, marker in markers.items()}
    tensors = {name: _record(name, group, configs.get(name, {})) for name, group in groups.items()}
    size = path.stat().st_size
    start = min((entry.begin for entry in entries), default=size)
    named = {name: config["format"] for name, config in configs.items() if isinstance(config.get("format"), str)}
    unreadable = tuple(sorted(f"{name.removesuffix(_WEIGHT)}{_MARKER}" for name in configs.keys() - named.keys()))
    return NativeHeader(path, from_text(text), tensors, size, start, frozenset(map(str, named.values())), unreadable)


def _format(file: BinaryIO, marker: TensorEntry) -> Mapping[str, object]:
    """Return the JSON object of a marker, empty if it cannot be read."""
    if marker.end - marker.begin > _MOST_MARKER_BYTES:
        return {}
    file.seek(marker.begin)
    try:
        found = json.loads(file.read(marker.end - marker.begin))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _record(name: str, parts: list[TensorEntry], config: Mapping[str, object]) -> NativeRecord:
    weight = next((part for part in parts if part.name == name), parts[0])
    nbytes = sum(part.end - part.begin for part in parts)
    if not config:
        return NativeRecord(name, weight.dtype, weight.shape, nbytes)
    stored, shape = _NAMES.get(str(config.get("format")), str(config.get("format"))), weight.shape
    if config.get("format") == _LEVELS:
        stored, shape = _levels(parts, weight.shape, config)
    elif len(shape) == 2 and (codes := _CODES_A_BYTE.get(stored)):
        shape = (shape[0], shape[1] * codes)
    return NativeRecord(name, stored, shape, nbytes)


def _levels(
    parts: list[TensorEntry], stored: tuple[int, ...], config: Mapping[str, object]
) -> tuple[str, tuple[int, ...]]:
    """Return the name of W4A8 or W6A8, with an unusual group, and the shape of the weight; as stored if malformed."""
    params = config.get("params")
    group = config.get("group_size", params.get("group_size") if isinstance(params, dict) else None) or _USUAL_GROUP
    scales = next((part.shape for part in parts if part.name.endswith(".weight_s_rel")), ())
    if type(group) is not int or len(scales) != 2 or len(stored) != 2:
        return _LEVELS, stored
    columns = scales[1] * group
    name = "W6A8" if stored[1] * 4 == columns * 3 else "W4A8"
    return name if group == _USUAL_GROUP else f"{name}_G{group}", (stored[0], columns)
