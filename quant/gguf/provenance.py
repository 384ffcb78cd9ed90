"""The `wanquant.*` metadata, in which a converted file records its source, its settings and its errors."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..files.sentencepiece import SPIECE_KEY

VERSION = "0.2.0"
"""The version of the converter."""

RELATIVE_ERROR = "wanquant.relative_error"
"""FLOAT32 array in tensor order: |dequantized - source| / |source|."""
FIVE_D = "wanquant.five_d"
"""BOOL: tensors of more than 4 dimensions are stored as they are, not flattened."""
NON_FINITE = "wanquant.allow_non_finite"
"""BOOL, true or absent: NaN and infinity in the source were replaced by 0."""
ENCODERS = "wanquant.encoders"
"""STRING, for example "Q2_K 1, Q4_K 2": the revisions of the encoders; a type that is not named has revision 0."""
CALIBRATED = "wanquant.calibrated"
"""BOOL, true or absent: codes were rounded for the least error of the layers' outputs."""
CALIBRATION_SHA256 = "wanquant.calibration_sha256"
"""STRING or absent: the SHA-256 of all values of the calibration; calibrated files of version 0.2.0 lack it."""
CORRECTED_BIASES = "wanquant.corrected_biases"
"""ARRAY of STRING, may be absent: the biases that make up for the mean error of their layers' weights."""
LORAS = "wanquant.loras"
"""ARRAY of STRING, may be absent: the LoRAs that were added to the weights, each as FILE:STRENGTH."""
TOKENIZER = "wanquant.tokenizer"
"""STRING or absent: the SHA-256 of the tokenizer of a text encoder, which is a tensor of its own in a safetensors."""
TUNED = "wanquant.tuned"
"""STRING or absent: the SHA-256 of the capture that the file was tuned with, block by block."""
TARGET_SIZE = "wanquant.target_size"
"""UINT64: the size in bytes that the file was to have at most; 0 if a recipe was given."""
DATA_SHA256 = "wanquant.data_sha256"
"""STRING: SHA-256 of all bytes after the header, which `verify` compares."""
SOURCE_SHA256 = "wanquant.source_sha256"
SOURCE_MTIME = "wanquant.source_mtime_ns"
SOURCE_PARTS = "wanquant.source_parts"
"""STRING: a SHA-256 of the names, sizes and times of all files of the source; absent for a source of one file."""

_REVISION = re.compile(r"(\w{1,16}(?: \(ComfyUI\))?) (\d{1,9})(?!\d)")
_SOURCE_METADATA = "wanquant.source_metadata."
_IDENTIFYING = ("recipe", "target_size", "effort", "importance", "five_d", "source_name", "source_size")


def source_metadata(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return the `__metadata__` of the safetensors file that a GGUF was made from, for the host's model detection."""
    return {
        key.removeprefix(_SOURCE_METADATA): value
        for key, value in metadata.items()
        if key.startswith(_SOURCE_METADATA) and isinstance(value, str)
    }


def carried_metadata(source: Mapping[str, str]) -> dict[str, str]:
    """Return safetensors `__metadata__` under GGUF keys, the inverse of `source_metadata`."""
    return {_SOURCE_METADATA + key: value for key, value in source.items()}


def fingerprint(importance: Mapping[str, Tensor] | None) -> str:
    """Return the SHA-256 of an importance matrix, or an empty string without one.

    Of a calibration, that is the diagonal alone: see `CALIBRATION_SHA256` for the rest.

    Args:
        importance: for each weight's name, any float dtype (input channels,).
    """
    if importance is None:
        return ""
    digest = hashlib.sha256()
    for name, values in sorted(importance.items()):
        digest.update(name.encode() + b"\0")
        digest.update(values.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def encoders(revisions: Mapping[str, int]) -> dict[str, str]:
    """Return the metadata of encoder revisions by type; types of revision 0 are left out, so that it may be empty."""
    text = ", ".join(f"{name} {revision}" for name, revision in sorted(revisions.items()) if revision)
    return {ENCODERS: text} if text else {}


def encoder_revisions(metadata: Mapping[str, Any]) -> dict[str, int]:
    """Return the encoder revisions that a file records, by type: the inverse of `encoders`."""
    recorded = metadata.get(ENCODERS)
    pairs = _REVISION.findall(recorded) if isinstance(recorded, str) else []
    return {name: int(revision) for name, revision in pairs}


def corrected_in(metadata: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the corrected biases that a file records; nothing for a file of another program."""
    return frozenset(_strings(metadata, CORRECTED_BIASES))


def baked_into(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the LoRAs that a file records, each as FILE:STRENGTH."""
    return _strings(metadata, LORAS)


def _strings(metadata: Mapping[str, Any], key: str) -> tuple[str, ...]:
    recorded = metadata.get(key)
    names = recorded if isinstance(recorded, Sequence) and not isinstance(recorded, str) else ()
    return tuple(name for name in names if isinstance(name, str))


def is_same_conversion(existing: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Return whether a file's metadata names the same source, settings, LoRAs and tokenizer as `wanted`.

    The source is compared by its name and size only. Versions and encoder revisions may differ: an update of the pack
    must not stop a saved graph. A file of an older version that does not name all of its calibration may be the same.
    """
    same = (*(f"wanquant.{name}" for name in _IDENTIFYING), NON_FINITE, CALIBRATED, TUNED, TOKENIZER)
    is_same = records_same(existing, wanted, *same)
    # The tokenizer can come from a file beside the source.
    is_same = is_same and corrected_in(existing) == corrected_in(wanted) and baked_into(existing) == baked_into(wanted)
    is_same = is_same and _tokenizer(existing) == _tokenizer(wanted)
    return is_same and (CALIBRATION_SHA256 not in existing or records_same(existing, wanted, CALIBRATION_SHA256))


def records_same(existing: Mapping[str, Any], wanted: Mapping[str, Any], *keys: str) -> bool:
    """Return whether a file records the wanted text, number or absence under each key; it may have an array there."""
    return all(not isinstance(existing.get(key), np.ndarray) and existing.get(key) == wanted.get(key) for key in keys)


def _tokenizer(metadata: Mapping[str, Any]) -> object:
    """Return a file's sentencepiece model: bytes, which a read file has as an array; another file may have anything."""
    model = metadata.get(SPIECE_KEY, b"")
    return model.tobytes() if isinstance(model, np.ndarray) else model


def relative_errors(metadata: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """Return the relative error that the file records for each tensor; nothing for a file of another program."""
    errors = metadata.get(RELATIVE_ERROR)
    if not isinstance(errors, np.ndarray) or errors.dtype.kind != "f" or len(errors) != len(names):
        return {}
    return {name: error for name, error in zip(names, errors.tolist(), strict=True) if 0 <= error < math.inf}
