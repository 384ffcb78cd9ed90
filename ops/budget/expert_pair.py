"""Loads the two experts of a Wan 2.2 model, and checks that they are a pair."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from torch import Tensor

from ...quant import QuantError
from .. import host
from ..loading.native_model import load_any_model
from ..packed.layout import is_packed
from ..packed.precision import EXACT
from .experts import share_memory

_COMPARED_BYTES = 4096
"""Bytes of each tensor that are compared; two different experts differ at the beginning of nearly every tensor."""


def load_expert_pair(
    high: str | os.PathLike[str],
    low: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    precision: str = EXACT,
) -> tuple[ModelPatcher, ModelPatcher, str]:
    """Load two experts that share memory, and return them with a warning, or "" if there is nothing to warn of.

    Args:
        high: the GGUF or safetensors file of the expert for the first steps.
        low: the GGUF or safetensors file of the expert for the last steps.
        dtype: the dtype to compute in; if None, the host chooses it for the device.
        precision: as for `load_any_model`.

    Raises:
        QuantError: as `load_any_model` raises it, or experts of different architectures.
    """
    first, second = (load_any_model(path, dtype=dtype, precision=precision) for path in (high, low))
    differences = _differences(first, second)
    if differences:
        raise QuantError(
            f"{Path(high).name} and {Path(low).name} are not the experts of one model: {differences}; choose the"
            " high-noise and the low-noise file of the same Wan 2.2 model"
        )
    share_memory(first, second)
    return first, second, _warning(Path(high), Path(low), first, second)


def _differences(first: ModelPatcher, second: ModelPatcher) -> str:
    """Describe in what two models differ: the host's class of the model, or the arguments that it was built with."""
    models = [patcher.model for patcher in (first, second)]
    classes = {(type(model.model_config).__name__, type(model.diffusion_model).__name__) for model in models}
    found = [" and ".join(sorted("/".join(names) for names in classes))] if len(classes) > 1 else []
    configs = [model.model_config.unet_config for model in models]
    keys = sorted({*configs[0], *configs[1]} - {"dtype"})
    pairs = ((key, *(config.get(key) for config in configs)) for key in keys)
    return ", ".join(found + [f"{key} {one} and {other}" for key, one, other in pairs if one != other])


def _warning(high: Path, low: Path, first: ModelPatcher, second: ModelPatcher) -> str:
    if high.samefile(low):
        what = f"{high.name} is chosen twice"
    elif _have_same_content(first.model.diffusion_model, second.model.diffusion_model):
        what = f"{high.name} and {low.name} hold the same expert"
    else:
        return ""
    return f"{what}: choose the high-noise and the low-noise file, unless this is meant to be"


def _have_same_content(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    """Return whether all tensors that both models store in the same type begin with the same bytes.

    Two files of one expert in different types share at least their biases.
    """
    others = dict(second.named_parameters())
    pairs = ((_beginning(tensor), _beginning(others[name])) for name, tensor in first.named_parameters())
    same = [torch.equal(one, other) for (kind, one), (other_kind, other) in pairs if kind == other_kind]
    return bool(same) and all(same)


def _beginning(tensor: Tensor) -> tuple[str, Tensor]:
    kind, data = str(tensor.dtype), tensor
    if isinstance(tensor, QuantizedTensor) and is_packed(tensor):
        kind, data = tensor.params.qtype, host.packed_bytes(tensor)
    data = data.detach()
    return kind, data.flatten()[:_COMPARED_BYTES].contiguous().view(torch.uint8)[:_COMPARED_BYTES].cpu()
