"""Slices of the host's patches, for some rows of the weight that they are for."""

from __future__ import annotations

from math import lcm
from typing import Any

from comfy.weight_adapter import LoHaAdapter, LoKrAdapter, LoRAAdapter, OFTAdapter, WeightAdapterBase
from torch import Tensor

from .. import host
from .layout import is_packed, pack

Patch = tuple[Any, ...]
"""A patch of the host's: (strength, adapter or difference, strength of the model, offset, function)."""


def row_multiple(patch: Patch, rows: int) -> int:
    """Return the number of rows at whose multiples `patch` can be sliced.

    It is `rows`, the number of rows of the weight, if the patch makes rows depend on each other.
    """
    _, value, _, offset, function = patch
    return rows if offset is not None or function is not None else _value_multiple(value, rows)


def slice_patch(patch: Patch, rows: int, start: int, stop: int) -> Patch:
    """Return the patch of the rows from `start` to `stop`, both multiples of `row_multiple(patch, rows)`."""
    strength, value, *rest = patch
    return (strength, _slice_value(value, rows, start, stop), *rest)


def slice_weight(weight: Any, start: int, stop: int) -> Tensor:  # noqa: ANN401
    """Return rows of a weight, (rows, ...), in its dtype; those of a packed one stay packed, unlike `weight[...]`."""
    if not is_packed(weight):
        part: Tensor = weight[start:stop]
    else:
        rows = host.packed_bytes(weight)[start:stop]
        part = pack(rows, weight.params.qtype, (stop - start, *weight.shape[1:]), weight.dtype)
    return part


def _value_multiple(value: Any, rows: int) -> int:  # noqa: ANN401
    if isinstance(value, WeightAdapterBase):
        return max((_spans(value, rows) or {0: rows}).values())
    if isinstance(value, list):  # The weight of another model with its own patches, from nodes that merge models.
        (weight, _), *patches = value
        return lcm(*(row_multiple(p, rows) for p in patches)) if len(weight) == rows else rows
    difference = value[-1][0] if isinstance(value[0], str) else value[0]
    return 1 if len(difference) == rows else rows


def _slice_value(value: Any, rows: int, start: int, stop: int) -> Any:  # noqa: ANN401
    if isinstance(value, WeightAdapterBase):
        weights = list(value.weights)
        for index, span in (_spans(value, rows) or {}).items():
            if weights[index] is not None:
                weights[index] = weights[index][start // span : stop // span]
        return type(value)(value.loaded_keys, tuple(weights))
    if isinstance(value, list):
        (weight, convert), *patches = value
        return [(slice_weight(weight, start, stop), convert), *(slice_patch(p, rows, start, stop) for p in patches)]
    if isinstance(value[0], str):
        kind, (difference, *options) = value
        return (kind, (slice_weight(difference, start, stop), *options))
    return (slice_weight(value[0], start, stop),)


def _spans(adapter: WeightAdapterBase, rows: int) -> dict[int, int] | None:
    """Return which of the adapter's tensors can be sliced by rows, and how many rows one row of the tensor is for.

    The keys are indices into `adapter.weights`. None means that the adapter cannot be sliced.

    Source: comfy/weight_adapter/{lora,loha,lokr,oft}.py `load` and `calculate_weight`, ComfyUI 0.30.0.
    """
    weights = adapter.weights
    if isinstance(adapter, LoRAAdapter):
        spans, dora, whole = {0: 1}, 4, weights[3:4] + weights[5:]  # Tucker's middle factor; another shape.
    elif isinstance(adapter, LoHaAdapter):
        spans, dora, whole = {0: 1, 3: 1}, 7, weights[5:7]
    elif isinstance(adapter, LoKrAdapter):
        span = len(weights[1] if weights[1] is not None else weights[5])
        spans, dora, whole = {0: span, 3: span}, 8, weights[7:8]
    elif isinstance(adapter, OFTAdapter):
        spans, dora, whole = {0: weights[0].shape[1]}, 3, (weights[2] or None,)  # It limits the norm of all blocks.
    else:
        return None
    if weights[dora] is not None:
        spans[dora] = 1  # A norm per row. A norm per column depends on all rows, and fails the next check.
    sliceable = all(weights[index] is None or len(weights[index]) * span == rows for index, span in spans.items())
    return spans if sliceable and all(part is None for part in whole) else None
