"""Loads a LoRA in a GGUF file, which ComfyUI's own LoRA nodes do not list."""

from __future__ import annotations

import os
from pathlib import Path

import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...quant import QuantError, open_gguf
from ...quant.sources.lora_file import KEPT, check_is_lora, common_alphas, host_name, host_shape
from .by_host import built_by_host


def load_lora(patcher: ModelPatcher, path: str | os.PathLike[str], strength: float) -> ModelPatcher:
    """Return a clone of the model with the LoRA added, as ComfyUI's LoRA loader does it.

    Args:
        patcher: the model, from any loader.
        path: a GGUF file whose tensors have the names of a safetensors LoRA or of llama.cpp's.
        strength: the factor of the LoRA.

    Raises:
        QuantError: a malformed GGUF, a file that is not a LoRA, or a LoRA for another model.
    """
    tensors = read_lora(path)
    with built_by_host(Path(path), "add this LoRA, whose tensors are incomplete or of other shapes"):
        patched, _ = comfy.sd.load_lora_for_models(patcher, None, tensors, strength, 0)
    before = sum(map(len, patcher.patches.values()))
    if sum(map(len, patched.patches.values())) == before:
        raise QuantError(
            f"{path}: none of its tensors names a weight of this model (tensors {', '.join(list(tensors)[:3])}, ...);"
            " choose a LoRA for this model"
        )
    return patched


def read_lora(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of a LoRA by the names that ComfyUI's LoRA loader knows.

    Returns:
        Tensors of the shapes in the file, in float32 if they are quantized, else in their own dtype. ggml drops
        leading dimensions of 1, which are restored: (1, in_features) for a factor of rank 1.

    Raises:
        QuantError: a malformed GGUF, or a file that is not a LoRA.
    """
    file = open_gguf(path)
    check_is_lora(path, file.tensors.keys())
    tensors = {}
    for stored_name, tensor in file.tensors.items():
        name, values = host_name(stored_name), tensor.dequantize(KEPT.get(tensor.qtype.name, torch.float32))
        tensors[name] = values.view(host_shape(name, tuple(values.shape)))
    alphas = common_alphas(path, file.metadata, tensors.keys())
    return tensors | {name: torch.tensor(alpha) for name, alpha in alphas.items()}
