"""Attention preferences: JSON texts that tell ComfyUI which attention function to use in a module.

A checkpoint stores each as a uint8 tensor beside the weights of the module. A GGUF stores them as metadata instead,
because other loaders would refuse unknown tensors.

Source: comfy/ldm/modules/attention.py ComfyAttention @ 05080f6.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import QuantError
from ..files.strict_json import parse_json
from .json_tensor import MAX_BYTES, read_json
from .tensors import StoredTensor

_TENSOR = ".comfy_attention.config"
_KEY = "comfy_attention."
_DAMAGED = "the file is damaged, download it again"


def take_preferences(
    stored: Mapping[str, StoredTensor],
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Split tensors into those that are not preferences, and the preferences as metadata.

    Raises:
        QuantError: a preference that is not JSON text.
    """
    others = {name: tensor for name, tensor in stored.items() if not tensor.name.endswith(_TENSOR)}
    preferences = {_KEY + t.name.removesuffix(_TENSOR): _text(t) for n, t in stored.items() if n not in others}
    return others, preferences


def preference_tensors(metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the tensors of the preferences in `metadata` by name: uint8, (bytes of the text,).

    Raises:
        QuantError: a preference that ComfyUI could not read.
    """
    texts = {key.removeprefix(_KEY): text for key, text in metadata.items() if key.startswith(_KEY)}
    return {
        module + _TENSOR: torch.frombuffer(bytearray(_checked(module, text)), dtype=torch.uint8)
        for module, text in texts.items()
    }


def without_preferences(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata without the preferences."""
    return {key: text for key, text in metadata.items() if not key.startswith(_KEY)}


def preference_metadata(configs: Mapping[str, object]) -> dict[str, str]:
    """Return the metadata for preferences that are given by the names of their modules."""
    return {_KEY + module: json.dumps(config) for module, config in configs.items()}


def _text(tensor: StoredTensor) -> str:
    text, preference = read_json(tensor, "the preference that ComfyUI writes")
    _check(preference, f"{tensor.file.path}: tensor {tensor.name}: {text!r:.40}")
    return text


def _checked(module: str, text: str) -> bytes:
    """Return the bytes of a preference in metadata, which any program can have written."""
    where = f"metadata {_KEY}{module}: the preference"
    _check(parse_json(text, where, _DAMAGED), f"{where} is {text!r:.40}")
    if len(encoded := text.encode()) > MAX_BYTES:
        raise QuantError(f"{where} has {len(encoded)} bytes, expected at most {MAX_BYTES}; {_DAMAGED}")
    return encoded


def _check(preference: object, found: str) -> None:
    if not isinstance(preference, dict | list):
        raise QuantError(f"{found}, expected a JSON object or a list of objects; {_DAMAGED}")
