"""The patches of one packed weight, applied to any of its dequantized rows.

A LoRA thus never needs the whole dequantized weight. The plain LoRAs of a layer are added here, as one matrix product
in the compute dtype. All other patches use the host's arithmetic, on the rows at hand where the patch can be sliced.
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

from .patch_rows import Patch, row_multiple, slice_patch, slice_weight

PatchRows = Callable[[Tensor, int], Tensor]
"""(some dequantized rows, index of the first) -> these rows, patched. It may write to its input."""


@dataclass(frozen=True)
class LowRank:
    """Plain LoRAs, concatenated along their rank and added as one product: weight += up @ down.

    The cost does not depend on the number of tokens. Applying them to the tokens, x @ down.T @ up.T, is cheaper only
    for fewer than rows * columns / (rows + columns) tokens. For a weight of 5120 x 5120 these are 2560 tokens. A video
    has more, such as 32,760, and the 512 tokens of the text cost little either way.
    """

    factors: tuple[tuple[Tensor, Tensor, float], ...]
    """The up (rows, rank) and down (rank, columns) matrix of each LoRA, floating point, and its scale."""
    row_multiple: int = 1

    def size(self, dtype: torch.dtype) -> int:
        """Return the bytes of the factors in `dtype`."""
        return sum((up.numel() + down.numel()) * dtype.itemsize for up, down, _ in self.factors)

    def on(self, device: torch.device, dtype: torch.dtype) -> LowRank:
        """Return one equal LoRA on `device`; the scales are multiplied into its `up`, which is rounded once."""
        ups = [(cast_to_device(up, device, torch.float32) * scale).to(dtype) for up, _, scale in self.factors]
        downs = [cast_to_device(down, device, dtype) for _, down, _ in self.factors]
        return LowRank(((torch.cat(ups, 1), torch.cat(downs), 1.0),))

    def __call__(self, rows: Tensor, start: int) -> Tensor:
        """Add the LoRAs to `rows`, in place, and return it; see `PatchRows`."""
        for up, down, scale in self.factors:
            rows.addmm_(up[start : start + len(rows)], down, alpha=scale)
        return rows


@dataclass(frozen=True)
class HostPatch:
    """A patch that is not a plain LoRA."""

    key: str
    patch: Patch
    module: Any
    """The layer; some patches need its packed, unpatched `weight`."""
    row_multiple: int

    def size(self, dtype: torch.dtype) -> int:
        """Return the bytes of the patch, which keeps its own dtype."""
        return sum(tensor.nbytes for tensor in _tensors(self.patch[1]))

    def on(self, device: torch.device, dtype: torch.dtype) -> HostPatch:
        """Return the patch with its tensors on `device`."""
        strength, value, *rest = self.patch
        return replace(self, patch=(strength, _on_device(value, device), *rest))

    def __call__(self, rows: Tensor, start: int) -> Tensor:
        """Return the patched rows; see `PatchRows`."""
        patch, original, stop = self.patch, self.module.weight, start + len(rows)
        if len(rows) < len(original):
            patch, original = slice_patch(patch, len(original), start, stop), slice_weight(original, start, stop)
        patched: Tensor = comfy.lora.calculate_weight(
            [patch], rows, self.key, rows.dtype, {self.key: [(original, None)]}
        )
        return patched


@dataclass(frozen=True)
class BoundPatches:
    """The patches of one weight on one device, for one use of the weight; see `PatchRows`."""

    steps: tuple[LowRank | HostPatch, ...]

    def __call__(self, rows: Tensor, start: int) -> Tensor:
        for step in self.steps:
            rows = step(rows, start)
        return rows

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """The up (rows, rank) and down (rank, columns) matrix, float, if the patches are LoRAs alone."""
        if len(self.steps) != 1 or not isinstance(self.steps[0], LowRank):
            return None
        ((up, down, _),) = self.steps[0].factors
        return up, down


class OnTheFly:
    """The patches of one packed weight as an entry of the host's `weight_function` list of a layer.

    They are applied in the compute dtype.
    """

    def __init__(self, key: str, patches: list[Patch], module: torch.nn.Module) -> None:
        self.patches = list(patches)
        # A strong reference would be a cycle, which keeps gigabytes until the garbage collector runs.
        self._module: Any = weakref.proxy(module)
        self._steps = tuple(_steps(key, patches, self._module))
        self._held: tuple[LowRank | HostPatch, ...] = ()
        self._held_as: tuple[torch.device, torch.dtype] | None = None
        self.row_multiple = lcm(*(step.row_multiple for step in self._steps))
        """The first row and the number of rows that are patched at a time must be multiples of this."""

    def __call__(self, weight: Tensor) -> Tensor:
        """Return the patched weight.

        Args:
            weight: the whole dequantized weight, (rows, columns), in the compute dtype. It may be overwritten.
        """
        return self.bind(weight.device, weight.dtype)(weight, 0)

    def bind(self, device: torch.device, dtype: torch.dtype) -> BoundPatches:
        """Return a function that patches rows, for one use of the weight; the patches are moved to `device` once."""
        held = self._held_as == (device, dtype)
        return BoundPatches(self._held if held else tuple(step.on(device, dtype) for step in self._steps))

    def applies(self, patches: list[Patch]) -> bool:
        """Return whether these very patches, in this order, are the ones that are applied here."""
        return len(patches) == len(self.patches) and all(a is b for a, b in zip(patches, self.patches, strict=True))

    def size(self) -> int:
        """Return the bytes that the patches need on an accelerator."""
        return sum(step.size(self._module.weight.dtype) for step in self._steps)

    def move_to(self, device: torch.device) -> int:
        """Keep the patches on `device`; a method that the host calls.

        Returns:
            The bytes that they need on an accelerator. For the CPU, where they are the LoRA file's own tensors, the
            bytes that this frees.
        """
        if comfy.model_management.is_device_cpu(device):
            freed = self.size() if self._held_as else 0
            self._held, self._held_as = (), None
            return freed
        # The device of a tensor has an index, but the host's device may lack it, as on Macs.
        device, dtype = torch.empty(0, device=device).device, self._module.weight.dtype
        self._held, self._held_as = tuple(step.on(device, dtype) for step in self._steps), (device, dtype)
        return self.size()


def _steps(key: str, patches: list[Patch], module: Any) -> Iterator[LowRank | HostPatch]:  # noqa: ANN401
    """Yield the patches in their order, with consecutive plain LoRAs as one."""
    shape = module.weight.shape
    for plain, group in groupby(patches, lambda patch: _factors(patch, shape) is not None):
        if plain:
            factors = [f for f in (_factors(patch, shape) for patch in group) if f and f[2]]
            yield from [LowRank(tuple(factors))] if factors else []
        else:
            yield from (HostPatch(key, patch, module, row_multiple(patch, shape[0])) for patch in group)


def _factors(patch: Patch, shape: torch.Size) -> tuple[Tensor, Tensor, float] | None:
    """Return up, down and scale of a plain LoRA of the whole weight, None for any other patch."""
    strength, adapter, strength_model, offset, function = patch
    if type(adapter) is not LoRAAdapter or strength_model != 1 or offset is not None or function is not None:
        return None
    up, down, alpha, *rest = adapter.weights
    if any(part is not None for part in rest) or up.ndim != 2 or (up.shape[0], down.shape[-1]) != tuple(shape):
        return None
    return up, down, strength * (alpha / down.shape[0] if alpha is not None else 1.0)


def _on_device(value: Any, device: torch.device) -> Any:  # noqa: ANN401
    """Return a patch value of the host's with all its tensors on `device`."""
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
