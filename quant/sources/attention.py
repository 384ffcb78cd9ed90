"""Attention preferences: which attention ComfyUI is to run in a module, as JSON text in a tensor beside its weights.

A GGUF carries them as metadata, where other loaders find no tensor that they do not know.
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
    """The tensors that are no preferences, and the preferences as metadata.

    Raises:
        QuantError: a preference that is not JSON text.
    """
    others = {name: tensor for name, tensor in stored.items() if not tensor.name.endswith(_TENSOR)}
    preferences = {_KEY + t.name.removesuffix(_TENSOR): _text(t) for n, t in stored.items() if n not in others}
    return others, preferences


def preference_tensors(metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors that `take_preferences` took, uint8 (bytes of the text,), by their names."""
    texts = {key.removeprefix(_KEY) + _TENSOR: text for key, text in metadata.items() if key.startswith(_KEY)}
    return {name: torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) for name, text in texts.items()}


def without_preferences(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata of a file whose preferences are tensors again."""
    return {key: text for key, text in metadata.items() if not key.startswith(_KEY)}


def preference_metadata(configs: Mapping[str, object]) -> dict[str, str]:
    """Preferences as metadata, by the names of their modules."""
    return {_KEY + module: json.dumps(config) for module, config in configs.items()}


def _text(tensor: StoredTensor) -> str:
    if tensor.dtype not in ("U8", "I8") or not 0 < tensor.nbytes <= _MAX_BYTES:
        raise _error(tensor, f"{tensor.nbytes} bytes of {tensor.dtype}, expected up to {_MAX_BYTES} of U8")
    try:
        text = tensor.peek().numpy().tobytes().decode()
        preference = json.loads(text)
    except (ValueError, RecursionError):
        raise _error(tensor, "not the JSON text that ComfyUI writes") from None
    if not isinstance(preference, dict | list):
        raise _error(tensor, f"{text!r:.40}, expected a JSON object or a list of them")
    return text


def _error(tensor: StoredTensor, problem: str) -> QuantError:
    return QuantError(f"{tensor.file.path}: tensor {tensor.name}: {problem}; the file is damaged, download it again")
