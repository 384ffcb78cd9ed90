"""Loads a LoRA in a GGUF file, which ComfyUI's own LoRA nodes do not list."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...quant import QuantError, open_gguf
from .by_host import built_by_host

_KEPT = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ALPHA_KEY = "adapter.lora.alpha"
# llama.cpp writes `NAME.weight.lora_a`.
_LLAMA = re.compile(r"(?:\.weight)?\.lora_([ab])$")
_DOWN = ".lora_A.weight"
# The fewest dimensions of tensors that ComfyUI multiplies or adds; ggml drops leading ones of size 1.
_LEAST_DIMS = (
    (re.compile(r"(\.lora_(A|B|up|down)|[._]lora\.(up|down))\.weight$|\.(hada|lokr)_w\d(_[ab])?$|\.dora_scale$"), 2),
    (re.compile(r"\.oft_(blocks|diag)$|\bmodulation\.(diff|set_weight)$|\.diff_m$|\.emb_pos\.(diff|set_weight)$"), 3),
)
_OF_A_LORA = re.compile(r"[._](lora[._]|hada_|lokr_|oft_|boft_)|\.diff(_b)?$")


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
    if not any(_OF_A_LORA.search(name) for name in file.tensors):
        names = ", ".join(list(file.tensors)[:3]) or "none"
        raise QuantError(f"{path}: not a LoRA (tensors {names}, ...); choose a LoRA, or load the file as a model")
    tensors = {}
    for stored_name, tensor in file.tensors.items():
        name = _LLAMA.sub(lambda match: f".lora_{match[1].upper()}.weight", stored_name)
        values = tensor.dequantize(_KEPT.get(tensor.qtype.name, torch.float32))
        least = next((dims for pattern, dims in _LEAST_DIMS if pattern.search(name)), 0)
        tensors[name] = values[(None,) * (least - values.ndim)]
    alpha = file.metadata.get(_ALPHA_KEY)
    if alpha is not None:
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise QuantError(f"{path}: {_ALPHA_KEY}: {alpha!r:.40}, expected a finite number; download the LoRA again")
        for layer in [name.removesuffix(_DOWN) for name in tensors if name.endswith(_DOWN)]:
            tensors.setdefault(f"{layer}.alpha", torch.tensor(float(alpha)))
    return tensors
