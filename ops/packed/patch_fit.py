"""Whether patches are for the model they are given to; the host would log what is not, layer by layer at every step."""

from __future__ import annotations

import logging
from typing import Any

import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter import LoHaAdapter, LoRAAdapter
from torch import Tensor

from ...quant import QuantError

logger = logging.getLogger(__name__)

_NAMED = 3
_UNMATCHED = "lora key not loaded: "
"""How the host's log begins a line. Source: comfy/lora.py load_lora, ComfyUI 0.30.0."""


class _Unmatched(logging.Handler):
    """Tensors of the LoRA at hand that name no weight: the host hands over the others, and only logs these."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.keys: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = str(record.msg)
        if message.startswith(_UNMATCHED):
            self.keys.append(message.removeprefix(_UNMATCHED))


_unmatched = _Unmatched()


def follow_loras(patcher: ModelPatcher) -> None:
    """From now on, know of each LoRA for this model what the host leaves out of it."""
    logging.getLogger().addHandler(_unmatched)
    # The host's LoRA loader begins by asking the model for its names, and so does the first measuring of its size.
    patcher.model_size()
    patcher.model.register_state_dict_pre_hook(_begin)


def _begin(*_: object) -> None:
    _unmatched.keys.clear()


def fitting(model: torch.nn.Module, patches: dict[Any, Any]) -> dict[Any, Any]:
    """The patches without those of another size than the weight they name, which the log counts and names.

    Args:
        patches: the host's: name of a weight, or a tuple of it and a part of it -> adapter or difference.

    Raises:
        QuantError: no tensor of a LoRA names a weight of the model, or none that does has its size.
    """
    if not patches:
        keys, _unmatched.keys = _unmatched.keys, []
        tensors = f"{len(keys)} tensors ({_some(keys)})" if keys else "tensors"
        raise QuantError(
            f"LoRA of another model: none of its {tensors} names a weight of this one; choose a LoRA for this model"
        )
    misfits = {key: sizes for key, value in patches.items() if (sizes := _misfit(model, key, value))}
    if not misfits:
        return patches
    named = _some([f"{key} for {theirs:,} weights, not {ours:,}" for key, (theirs, ours) in misfits.items()])
    message = f"{len(misfits)} of its {len(patches)} patches do not fit this model: {named}"
    if len(misfits) == len(patches):
        raise QuantError(f"LoRA of another model: {message}; choose a LoRA for this one")
    logger.warning("LoRA partly of another model: %s; they are left out", message)
    return {key: value for key, value in patches.items() if key not in misfits}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _misfit(model: torch.nn.Module, key: object, value: object) -> tuple[int, int] | None:
    """Numbers of weights of the patch and of the model's tensor, where they are known and differ."""
    size = _size(value)
    if size is None or not isinstance(key, str):
        return None
    try:
        weight: Tensor | None = comfy.utils.get_attr(model, key)
    except AttributeError:
        return None  # a text encoder's, which the host gives to every model
    return None if weight is None or weight.numel() == size else (size, weight.numel())


def _size(value: Any) -> int | None:  # noqa: ANN401
    """Of how many weights the patch is; None where it may change the shape, or for kinds that this does not know."""
    if isinstance(value, LoRAAdapter):
        up, down, _, middle, _, shape = value.weights
        return len(up) * down[0].numel() if middle is None and shape is None else None
    if isinstance(value, LoHaAdapter):
        up, down, *_ = value.weights
        return len(up) * down[0].numel() if value.weights[5] is None else None
    if isinstance(value, tuple) and len(value) == 2 and value[0] in ("diff", "set") and len(value[1]) == 1:
        difference: Tensor = value[1][0]
        return difference.numel()
    return None
