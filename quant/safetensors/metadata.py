"""The metadata of a conversion as the `__metadata__` of a safetensors file, which holds text alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..gguf.provenance import (
    CALIBRATED,
    CORRECTED_BIASES,
    FIVE_D,
    LORAS,
    NON_FINITE,
    RELATIVE_ERROR,
    SOURCE_MTIME,
    TARGET_SIZE,
    carried_metadata,
    source_metadata,
)

OURS = "wanquant."
_NUMBERS = (TARGET_SIZE, SOURCE_MTIME, "wanquant.source_size")
_LISTS = (CORRECTED_BIASES, LORAS)
_FLAGS = (FIVE_D, NON_FINITE, CALIBRATED)
# It describes the layers of the source, and ComfyUI prefers it to the layers' own markers.
_OF_SOURCE_FORMAT = "_quantization_metadata"


def to_text(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return a conversion's metadata as text: the source's own under its own keys, and what starts with `wanquant.`.

    Numbers are in decimal, truth values `true` or `false`, lists in JSON. The relative errors are float32 in
    hexadecimal, so that their text has the same length whatever they are.
    """
    source = source_metadata(metadata)
    # Those of a source that is a conversion itself tell of that conversion.
    carried = {key: text for key, text in source.items() if key != _OF_SOURCE_FORMAT and not key.startswith(OURS)}
    own = metadata.keys() - carried_metadata(source).keys()
    return {"format": "pt", **carried, **{key: _text(metadata[key]) for key in sorted(own) if key.startswith(OURS)}}


def from_text(text: Mapping[str, str]) -> dict[str, Any]:
    """Return the metadata of a conversion from its text; a value that is not of its key's type is left out."""
    metadata: dict[str, Any] = dict(carried_metadata({k: v for k, v in text.items() if not k.startswith(OURS)}))
    for key, value in text.items():
        if key.startswith(OURS):
            try:
                metadata[key] = _value(key, value)
            except (ValueError, RecursionError):
                continue
    return metadata


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, np.ndarray) and value.dtype == np.float32:
        return value.astype("<f4").tobytes().hex()
    if isinstance(value, np.integer):
        return str(int(value))
    return json.dumps(value)


def _value(key: str, text: str) -> object:
    if key == RELATIVE_ERROR:
        return np.frombuffer(bytes.fromhex(text), "<f4")
    if key in _NUMBERS:
        return int(text)
    if key in _FLAGS:
        return {"true": True, "false": False}.get(text, False)
    if key in _LISTS:
        return json.loads(text)
    return text
