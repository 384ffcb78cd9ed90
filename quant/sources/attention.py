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
from .tensors import StoredTensor

_TENSOR = ".comfy_attention.config"
_KEY = "comfy_attention."
_MAX_BYTES = 1 << 16


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
    """Return the tensors of the preferences in `metadata` by name: uint8, (bytes of the text,)."""
    texts = {key.removeprefix(_KEY) + _TENSOR: text for key, text in metadata.items() if key.startswith(_KEY)}
    return {name: torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) for name, text in texts.items()}


def without_preferences(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata without the preferences."""
    return {key: text for key, text in metadata.items() if not key.startswith(_KEY)}


def preference_metadata(configs: Mapping[str, object]) -> dict[str, str]:
    """Return the metadata for preferences that are given by the names of their modules."""
    return {_KEY + module: json.dumps(config) for module, config in configs.items()}


def _text(tensor: StoredTensor) -> str:
    if tensor.dtype not in ("U8", "I8") or not 0 < tensor.nbytes <= _MAX_BYTES:
        raise _error(tensor, f"{tensor.nbytes} bytes of {tensor.dtype}, expected 1 to {_MAX_BYTES} bytes of U8")
    try:
        text = tensor.peek().numpy().tobytes().decode()
        preference = json.loads(text)
    except (ValueError, RecursionError):
        raise _error(tensor, "not JSON text, expected the preference that ComfyUI writes") from None
    if not isinstance(preference, dict | list):
        raise _error(tensor, f"{text!r:.40}, expected a JSON object or a list of objects")
    return text


def _error(tensor: StoredTensor, problem: str) -> QuantError:
    return QuantError(f"{tensor.file.path}: tensor {tensor.name}: {problem}; the file is damaged, download it again")
