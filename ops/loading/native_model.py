"""Diffusion models in safetensors, in ComfyUI's own formats too, through the host's own loader."""

from __future__ import annotations

import os
from pathlib import Path

import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher

from ...quant import QuantError
from ...quant.files.safetensors_header import read_safetensors_header
from ...quant.safetensors.header import NativeHeader, read_native_header
from ...quant.sources.layers import declared_formats
from ...quant.sources.names import known_naming
from ..packed.precision import EXACT, INT8
from .by_host import built_by_host
from .diffusion_model import load_diffusion_model
from .native_support import problems

SUFFIX = ".safetensors"


def load_any_model(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    add_on: str | os.PathLike[str] | None = None,
    precision: str = EXACT,
) -> ModelPatcher:
    """Load a diffusion model from a GGUF or a safetensors file; the suffix of the name tells which it is.

    Args:
        path: the file.
        dtype: the dtype to compute in; if None, the host chooses it for the device.
        add_on: as for `load_diffusion_model`.
        precision: as for `load_diffusion_model`; with `auto`, a safetensors file keeps the products of its format.

    Raises:
        QuantError: as `load_diffusion_model` and `load_native_model` raise it, or what is for GGUF files only.
    """
    if Path(path).suffix.lower() != SUFFIX:
        return load_diffusion_model(path, dtype=dtype, add_on=add_on, precision=precision)
    if precision == INT8 or add_on is not None:
        raise QuantError(f"{path}: add_on_name and int8 are for GGUF files; choose a .gguf file, or turn them off")
    return load_native_model(path, dtype=dtype)


def load_native_model(path: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> ModelPatcher:
    """Load a safetensors diffusion model, whose layers may be in ComfyUI's own quantized formats.

    Args:
        path: the file.
        dtype: the dtype to compute in; if None, the host chooses it for the device.

    Raises:
        QuantError: a malformed file, a format that this host cannot use, or a model that it cannot build.
    """
    path = Path(path)
    header = read_native_header(path)
    _check_markers(header)
    for problem in problems(header):
        raise QuantError(f"{path}: {problem}, or convert to a recipe that it loads")
    options = {} if dtype is None else {"dtype": dtype}
    with built_by_host(path):
        model: ModelPatcher = comfy.sd.load_diffusion_model(str(path), options)
    return model


def _check_markers(header: NativeHeader) -> None:
    """Refuse integers that neither a marker nor the metadata explains, and markers that cannot be read.

    The host would take codes for weights.
    """
    text, _ = read_safetensors_header(header.path)
    naming, declared = known_naming(header.path, header.tensors), declared_formats(header.path, text)
    # The host reads names in the metadata both with and without the prefix of the tensors.
    prefix = naming.prefix if naming else ""
    for name, tensor in header.tensors.items():
        layer = name.removesuffix(".weight")
        if layer == name or layer in declared or layer.removeprefix(prefix) in declared:
            continue
        if tensor.stored in ("I8", "U8"):
            raise QuantError(
                f"{header.path}: tensor {name}: {tensor.stored} without a readable comfy_quant, which ComfyUI would"
                " take for values of the weight; download the file again"
            )
        if f"{layer}.comfy_quant" in header.unreadable:
            raise QuantError(
                f"{header.path}: tensor {layer}.comfy_quant: got no JSON object with a format, which ComfyUI cannot"
                " load; download the file again"
            )
