"""Patches of one packed weight, applied to any rows of its decoded copy: no layer is decoded whole for a LoRA.

Plain LoRAs are added here, all of a layer as one matrix product in the compute dtype. Any other patch is left to the
host's own arithmetic, on the rows in question where it can be cut to them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from math import lcm
from typing import Any

import comfy.lora
import comfy.model_management
import torch
from comfy.model_management import cast_to_device
from comfy.weight_adapter import LoRAAdapter, WeightAdapterBase
from torch import Tensor

from .patch_rows import Patch, cut, cut_weight, row_multiple

PatchRows = Callable[[Tensor, int], Tensor]
"""(some rows of the decoded weight, index of the first) -> these rows, patched. It may write to what it is given."""


@dataclass(frozen=True)
class LowRank:
    """Plain LoRAs, added as one product: weight += up @ down, rank beside rank.

    That costs the same for any number of tokens. Through the tokens, x @ down.T @ up.T, it would take less arithmetic
    for fewer than rows * columns / (rows + columns), 2560 at 5120 x 5120: a video has 32,760, and of the text's 512
    there are too few to matter.
    """

    factors: tuple[tuple[Tensor, Tensor, float], ...]
    """Up (rows, rank), down (rank, columns), and what their product is multiplied with."""
    row_multiple: int = 1

    def size(self, dtype: torch.dtype) -> int:
        return sum((up.numel() + down.numel()) * dtype.itemsize for up, down, _ in self.factors)

    def on(self, device: torch.device, dtype: torch.dtype) -> LowRank:
        """A single LoRA of scale 1: scales are multiplied into up, and rounded once."""
        ups = [(cast_to_device(up, device, torch.float32) * scale).to(dtype) for up, _, scale in self.factors]
        downs = [cast_to_device(down, device, dtype) for _, down, _ in self.factors]
        return LowRank(((torch.cat(ups, 1), torch.cat(downs), 1.0),))

    def __call__(self, rows: Tensor, start: int) -> Tensor:
        for up, down, scale in self.factors:
            rows.addmm_(up[start : start + len(rows)], down, alpha=scale)
        return rows


@dataclass(frozen=True)
class HostPatch:
    """Any other patch."""

    key: str
    patch: Patch
    module: Any
    """Whose `weight`, packed and without patches, some patches are relative to."""
    row_multiple: int

    def size(self, dtype: torch.dtype) -> int:
        return sum(tensor.nbytes for tensor in _tensors(self.patch[1]))

    def on(self, device: torch.device, dtype: torch.dtype) -> HostPatch:
        strength, value, *rest = self.patch
        return replace(self, patch=(strength, _on_device(value, device), *rest))

    def __call__(self, rows: Tensor, start: int) -> Tensor:
        patch, original, stop = self.patch, self.module.weight, start + len(rows)
        if len(rows) < len(original):
            patch, original = cut(patch, len(original), start, stop), cut_weight(original, start, stop)
        patched: Tensor = comfy.lora.calculate_weight(
            [patch], rows, self.key, rows.dtype, {self.key: [(original, None)]}
        )
        return patched


class OnTheFly:
    """A weight function of the host's: the patches of one packed weight, in the compute dtype."""

    def __init__(self, key: str, patches: list[Patch], module: torch.nn.Module) -> None:
        self.patches = list(patches)
        # A reference would be a cycle, and a model of gigabytes would wait for the garbage collector.
        self._module: Any = weakref.proxy(module)
        self._steps = tuple(_steps(key, patches, self._module))
        self._held: tuple[LowRank | HostPatch, ...] = ()
        self._held_as: tuple[torch.device, torch.dtype] | None = None
        self.row_multiple = lcm(*(step.row_multiple for step in self._steps))
        """Rows of the weight can be patched a multiple of this at a time."""

    def __call__(self, weight: Tensor) -> Tensor:
        """The whole weight, patched. It may be written to: it must be a private copy."""
        return self.bind(weight.device, weight.dtype)(weight, 0)

    def bind(self, device: torch.device, dtype: torch.dtype) -> PatchRows:
        """For one use of the weight: its patches, brought to the device once for all rows."""
        held = self._held_as == (device, dtype)
        steps = self._held if held else tuple(step.on(device, dtype) for step in self._steps)

        def patch_rows(rows: Tensor, start: int) -> Tensor:
            for step in steps:
                rows = step(rows, start)
            return rows

        return patch_rows

    def applies(self, patches: list[Patch]) -> bool:
        return len(patches) == len(self.patches) and all(a is b for a, b in zip(patches, self.patches, strict=True))

    def size(self) -> int:
        """Bytes that `move_to` an accelerator would take there."""
        return sum(step.size(self._module.weight.dtype) for step in self._steps)

    def move_to(self, device: torch.device) -> int:
        """Keep the patches on `device`. The host's protocol: returns the bytes taken there, or given back by a move to
        the CPU, where the patches are the LoRA file's own again."""
        if comfy.model_management.is_device_cpu(device):
            freed = self.size() if self._held_as else 0
            self._held, self._held_as = (), None
            return freed
        # A tensor's device has an index, which the host's name for it may lack, as on Macs.
        device, dtype = torch.empty(0, device=device).device, self._module.weight.dtype
        self._held, self._held_as = tuple(step.on(device, dtype) for step in self._steps), (device, dtype)
        return self.size()


def _steps(key: str, patches: list[Patch], module: Any) -> Iterator[LowRank | HostPatch]:  # noqa: ANN401
    """The patches in their order, plain LoRAs that follow each other together."""
    shape = module.weight.shape
    for plain, group in groupby(patches, lambda patch: _factors(patch, shape) is not None):
        if plain:
            factors = [f for f in (_factors(patch, shape) for patch in group) if f and f[2]]
            yield from [LowRank(tuple(factors))] if factors else []
        else:
            yield from (HostPatch(key, patch, module, row_multiple(patch, shape[0])) for patch in group)


def _factors(patch: Patch, shape: torch.Size) -> tuple[Tensor, Tensor, float] | None:
    """Up, down and scale of a LoRA of the whole weight, None for any other patch."""
    strength, adapter, strength_model, offset, function = patch
    if type(adapter) is not LoRAAdapter or strength_model != 1 or offset is not None or function is not None:
        return None
    up, down, alpha, *rest = adapter.weights
    if any(part is not None for part in rest) or up.ndim != 2 or (up.shape[0], down.shape[-1]) != tuple(shape):
        return None
    return up, down, strength * (alpha / down.shape[0] if alpha is not None else 1.0)


def _on_device(value: Any, device: torch.device) -> Any:  # noqa: ANN401
    """The host's patch value with all its tensors on `device`."""
    if isinstance(value, Tensor):
        return cast_to_device(value, device, None)
    if isinstance(value, WeightAdapterBase):
        return type(value)(value.loaded_keys, _on_device(value.weights, device))
    return type(value)(_on_device(item, device) for item in value) if isinstance(value, tuple | list) else value


def _tensors(value: Any) -> Iterator[Tensor]:  # noqa: ANN401
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, WeightAdapterBase):
        yield from _tensors(value.weights)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
