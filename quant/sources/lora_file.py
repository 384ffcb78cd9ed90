"""The tensors of a LoRA file, safetensors or GGUF, under the names and in the shapes that ComfyUI's loader expects.

Source: comfy/weight_adapter, ComfyUI 0.30.0; llama.cpp convert_lora_to_gguf.py, which writes `NAME.weight.lora_a`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import QuantError
from ..qtype import QTYPES
from .files import HashedFile
from .opening import open_files
from .tensors import DTYPES, NUMBERS, PackedTensor, PlainTensor, SourceTensor, StoredTensor

KEPT = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes of a GGUF that are kept; quantized tensors become float32."""
_ALPHA_KEY = "adapter.lora.alpha"
_LLAMA = re.compile(r"(?:\.weight)?\.lora_([ab])$")
_DOWN = ".lora_A.weight"
# The fewest dimensions of tensors that ComfyUI multiplies or adds; ggml drops leading ones of size 1.
_LEAST_DIMS = (
    (re.compile(r"(\.lora_(A|B|up|down)|[._]lora\.(up|down))\.weight$|\.(hada|lokr)_w\d(_[ab])?$|\.dora_scale$"), 2),
    (re.compile(r"\.oft_(blocks|diag)$|\bmodulation\.(diff|set_weight)$|\.diff_m$|\.emb_pos\.(diff|set_weight)$"), 3),
)
_OF_A_LORA = re.compile(r"[._](lora[._]|hada_|lokr_|oft_|boft_)|\.diff(_b)?$")


@dataclass(frozen=True)
class LoRATensor:
    """A tensor of a LoRA, whose values stay in the file until they are read."""

    name: str
    """The name that ComfyUI's loader, or `lora_names`, knows."""
    shape: tuple[int, ...]
    source: SourceTensor | float
    """Where the values are; a number is the value itself."""

    def read(self) -> Tensor:
        """Return the values: floating point, of `shape`, in the dtype of the file unless that is quantized."""
        if isinstance(self.source, float):
            return torch.tensor(self.source)
        return self.source.read().to(KEPT.get(self.source.stored, self.source.dtype)).view(self.shape)


@dataclass(frozen=True)
class LoRAFile:
    """An open LoRA file."""

    path: Path
    tensors: Mapping[str, LoRATensor]
    files: list[HashedFile]

    def close(self) -> None:
        for file in self.files:
            file.close()


def open_lora(path: Path) -> LoRAFile:
    """Open a LoRA file.

    Raises:
        QuantError: no such file, a damaged one, or one that is not a LoRA.
    """
    opened = open_files(path)
    try:
        check_is_lora(path, {tensor.name for tensor in opened.tensors})
        tensors = [_tensor(stored, opened.is_gguf) for stored in opened.tensors]
        found = {tensor.name: tensor for tensor in tensors}
        if opened.is_gguf:
            alphas = common_alphas(path, opened.metadata, found.keys())
            found |= {name: LoRATensor(name, (), alpha) for name, alpha in alphas.items()}
    except BaseException:
        for file in opened.files:
            file.close()
        raise
    return LoRAFile(path, found, opened.files)


def check_is_lora(path: str | os.PathLike[str], names: Collection[str]) -> None:
    """Raise QuantError if none of the names of a file's tensors is that of a part of a LoRA."""
    if not any(_OF_A_LORA.search(name) for name in names):
        first = ", ".join(list(names)[:3]) or "none"
        raise QuantError(f"{path}: not a LoRA (tensors {first}, ...); choose a LoRA, or load the file as a model")


def host_name(name: str) -> str:
    """Return the name that ComfyUI's loader knows for a name in a GGUF."""
    return _LLAMA.sub(lambda match: f".lora_{match[1].upper()}.weight", name)


def host_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that ComfyUI's loader expects for a tensor in a GGUF, by its `host_name`."""
    least = next((dims for pattern, dims in _LEAST_DIMS if pattern.search(name)), 0)
    return (*(1,) * (least - len(shape)), *shape)


def common_alphas(
    path: str | os.PathLike[str], metadata: Mapping[str, Any], names: Collection[str]
) -> dict[str, float]:
    """Return the alpha that a GGUF has for all layers, by the names of the layers that lack their own.

    Raises:
        QuantError: an alpha that is not a finite number.
    """
    alpha = metadata.get(_ALPHA_KEY)
    if alpha is None:
        return {}
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise QuantError(f"{path}: {_ALPHA_KEY}: {alpha!r:.40}, expected a finite number; download the LoRA again")
    layers = [name.removesuffix(_DOWN) for name in names if name.endswith(_DOWN)]
    return {f"{layer}.alpha": float(alpha) for layer in layers if f"{layer}.alpha" not in names}


def _tensor(stored: StoredTensor, is_gguf: bool) -> LoRATensor:
    if stored.dtype in DTYPES or stored.dtype in NUMBERS:
        source: SourceTensor = PlainTensor.of(stored)
    elif stored.dtype in QTYPES:
        source = PackedTensor.of(stored, QTYPES[stored.dtype])
    else:
        raise QuantError(
            f"{stored.file.path}: tensor {stored.name}: dtype {stored.dtype} in a LoRA, expected one of"
            f" {', '.join(DTYPES)}; choose another LoRA"
        )
    name = host_name(stored.name) if is_gguf else stored.name
    return LoRATensor(name, host_shape(name, stored.shape) if is_gguf else stored.shape, source)
