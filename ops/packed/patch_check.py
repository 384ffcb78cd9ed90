"""Checks of one patch before the first step; the host takes factors as they are, and fails or is silent in a step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import comfy.lora
import torch
from comfy.weight_adapter import BOFTAdapter, OFTAdapter, WeightAdapterBase
from torch import Tensor

from ...quant import QuantError
from .layout import is_packed

_META = torch.device("meta")
_ADVICE = "the file is damaged or cut off, download it again or choose another LoRA"
_MAX_GROWTH = 16
"""How many times as many elements a patch may give a weight; those for control inputs widen the patch embedding."""


def check_finite(key: object, value: object) -> None:
    """Refuse a patch with a factor or an alpha that is NaN or infinite.

    Args:
        key: the host's key of the patch, for messages.
        value: an adapter of the host, or a tuple or list of tensors, numbers and texts.

    Raises:
        QuantError: such a value.
    """
    if not all(map(_is_finite, _leaves(value))):
        raise QuantError(f"LoRA with NaN or infinity in its patch of {key}, expected finite numbers; {_ADVICE}")


def computed_problem(key: str, value: object, weight: Tensor) -> str | None:
    """Return why a patch has no effect on a weight, or None if it has one or is of another kind.

    Only shapes are computed, on the meta device.

    Args:
        value: a patch of the host's.
        weight: the weight of any shape and dtype, packed or not.

    Raises:
        QuantError: the host's arithmetic fails.
    """
    is_set = isinstance(value, tuple) and len(value) == 2 and value[0] == "set"
    if not (is_set or isinstance(value, WeightAdapterBase)):
        return None
    applied: list[Tensor] = []

    def function(difference: Tensor) -> Tensor:
        applied.append(difference)
        return difference

    try:
        # The host runs nodes in inference mode, in which tensors do not count how often they are written to.
        with torch.inference_mode(False), torch.no_grad():
            target = torch.empty(weight.shape, device=_META)
            patched = comfy.lora.calculate_weight([(1.0, _on_meta(value), 1.0, None, function)], target, key)
    except NotImplementedError:  # an operation that the meta device does not have
        return None
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise QuantError(f"LoRA whose patch of {key} cannot be computed ({reason:.200}); {_ADVICE}") from None
    # The host logs most errors and goes on, so that the weight was not written to.
    written = patched is not target or target._version > 0
    if not (written and (is_set or applied)):
        return "has factors whose product is not of its shape"
    grown = patched.numel() > _MAX_GROWTH * weight.numel() or (is_packed(weight) and patched.shape != weight.shape)
    return f"becomes {tuple(patched.shape)} instead of {tuple(weight.shape)}" if grown else None


def _on_meta(value: Any) -> Any:  # noqa: ANN401
    """Return a patch value without its data.

    The constraint of OFT is left out, whose computation depends on the data and changes no shape.
    """
    if isinstance(value, Tensor):
        return value.to(_META)
    if isinstance(value, OFTAdapter | BOFTAdapter):
        unconstrained = [0.0 if isinstance(part, float) else part for part in value.weights]
        return type(value)(value.loaded_keys, _on_meta(tuple(unconstrained)))
    if isinstance(value, WeightAdapterBase):
        return type(value)(value.loaded_keys, _on_meta(value.weights))
    return type(value)(map(_on_meta, value)) if isinstance(value, tuple | list) else value


def _leaves(value: Any) -> Iterator[Any]:  # noqa: ANN401
    """Yield the tensors and numbers of a patch value; the weights of another model are not its own."""
    if isinstance(value, WeightAdapterBase):
        yield from _leaves(value.weights)
    elif isinstance(value, tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _is_finite(value: Any) -> bool:  # noqa: ANN401
    if isinstance(value, float):
        return math.isfinite(value)
    if not isinstance(value, Tensor) or not value.numel() or not value.dtype.is_floating_point or is_packed(value):
        return True
    # The extremes are NaN if any value is, and take no memory.
    return all(bool(extreme.isfinite()) for extreme in torch.aminmax(value.float() if value.itemsize == 1 else value))
