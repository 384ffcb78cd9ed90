"""Checks that patches match the model they are added to; the host would log a mismatch per layer at every step.

The host's LoRA loader looks up the parameters of the model in the LoRA file, and `lora_names` does so under more names.
Other tensors never reach the patcher, and ComfyUI logs each as "lora key not loaded". Known here are the patches that
were found, and that none was.
Source: comfy/lora.py load_lora, ComfyUI 0.30.0.
"""

from __future__ import annotations

from typing import Any

import comfy.utils
import torch
from comfy.weight_adapter import LoHaAdapter, LoRAAdapter
from torch import Tensor

from ...quant import QuantError
from ...quant.errors import PrintableLog
from ...quant.units import counted
from .patch_check import check_finite, computed_problem

logger = PrintableLog(__name__)

_NAMED = 3
"""How many mismatches a message names; it counts the others."""


def matching_patches(model: torch.nn.Module, patches: dict[Any, Any]) -> dict[Any, Any]:
    """Return the patches whose size is that of the parameter they name; the log names the others.

    Args:
        patches: the host's, by the name of a parameter, or by a tuple of the name and a part of the parameter.

    Raises:
        QuantError: there are no patches at all, all of them are of another size than their parameters, or one is
            damaged.
    """
    if not patches:
        raise QuantError(
            "LoRA for another model: none of its tensors names a weight of this model (ComfyUI's log lists their"
            " names), neither by Wan's names nor by Diffusers', with any usual prefix; choose a LoRA for this model"
        )
    for key, value in patches.items():
        check_finite(key, value)
    mismatches = {key: problem for key, value in patches.items() if (problem := _mismatch(model, key, value))}
    if not mismatches:
        return patches
    named = [f"{key} {problem}" for key, problem in list(mismatches.items())[:_NAMED]]
    if len(mismatches) > _NAMED:
        named.append(f"and {len(mismatches) - _NAMED} more")
    patched = counted(len(patches), "patch", "patches")
    message = f"no match in this model for {len(mismatches)} of its {patched} ({', '.join(named)})"
    if len(mismatches) == len(patches):
        raise QuantError(f"LoRA for another model: {message}; choose a LoRA for this model")
    logger.warning("LoRA partly for another model: %s; these patches are left out", message)
    return {key: value for key, value in patches.items() if key not in mismatches}


def _mismatch(model: torch.nn.Module, key: object, value: object) -> str | None:
    """Return how the patch does not match its parameter; None if it does, or if that is unknown.

    Raises:
        QuantError: a patch that the host could not compute.
    """
    if not isinstance(key, str):
        return None
    try:
        weight: Tensor | None = comfy.utils.get_attr(model, key)
    except AttributeError:
        return None  # The host also gives a model the patches of the text encoder.
    if weight is None:
        return None
    size = _n_elements(value)
    if size is not None and weight.numel() != size:
        return f"has {size:,} elements in the LoRA and {weight.numel():,} in the model"
    return computed_problem(key, value, weight)


def _n_elements(value: Any) -> int | None:  # noqa: ANN401
    """Return how many elements a patch changes, or None for kinds that are unknown or may change the shape."""
    if isinstance(value, LoRAAdapter):
        up, down, _, middle, _, shape = value.weights
        if not up.ndim or not down.ndim or not len(down):
            return None
        return len(up) * down[0].numel() if middle is None and shape is None else None
    if isinstance(value, LoHaAdapter):
        up, down, *_ = value.weights
        if not up.ndim or not down.ndim or not len(down):
            return None
        return len(up) * down[0].numel() if value.weights[5] is None else None
    if isinstance(value, tuple) and len(value) == 2 and value[0] in ("diff", "set") and len(value[1]) == 1:
        difference: Tensor = value[1][0]
        return difference.numel()
    return None
