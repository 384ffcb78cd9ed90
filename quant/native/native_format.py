"""What ComfyUI's quantized formats have in common: the tensors of a layer, and its marker `comfy_quant`."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..device import elements_at_a_time
from ..errors import QuantError
from .rotation import Rotation, rotate_as_kitchen

Effort = Literal["fast", "best"]
Rounding = Callable[["NativeFormat", Tensor], tuple[Tensor, Tensor, Tensor]]
"""Rounds weights for the least error of a layer's outputs.

It takes the format and weights in units of their row's scale, float32 (rows, columns). It returns the levels of the
weights, (rows, columns), the scales of their groups, (rows, groups), and factors of the rows' scales, (rows, 1).
"""
MARKER = "comfy_quant"
_BYTES = {"I8": 1, "U8": 1, "F8_E4M3": 1, "F32": 4}
# The rounding for outputs works on one column of all rows at a time, so that it needs more rows than a search.
ROUNDED_ELEMENTS = 1 << 22
# The smallest normal float32, as a lower limit of scales: below, processors lose bits or flush to zero.
TINY = 2.0**-126


@dataclass(frozen=True)
class Part:
    """One stored tensor of a layer."""

    suffix: str
    """What follows the name of the layer and a dot, such as `weight_scale`."""
    dtype: str
    """The name in safetensors: I8, U8, F32 or F8_E4M3."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return _BYTES[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True)
class NativeFormat(ABC):
    """A format of ComfyUI's, with one choice of its options."""

    name: str
    revision: int
    """Raised whenever the bytes of a converted weight change."""
    config: Mapping[str, object] = field(hash=False)
    """The JSON object of `comfy_quant`."""

    rotates: ClassVar[bool] = False
    """Whether weights are rotated before they are rounded, and inputs before the product."""
    free_scale: ClassVar[str] = ""
    """The part with a float32 scale of each row, or of the weight, that may have any value; empty without one."""
    multiple: ClassVar[int] = 1
    """Rows and columns are padded to a multiple of it, and ComfyUI takes the padded shape for that of the layer."""

    def takes(self, shape: tuple[int, ...]) -> str | None:
        """Return why the format cannot hold a weight of this shape, or None."""
        if len(shape) != 2 or 0 in shape:
            return f"shape {'x'.join(map(str, shape))}, not a matrix"
        return self._unfit(*shape)

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """Return the tensors of a layer in the order of the file: `weight` first, the marker last."""
        self._check(shape)
        return (*self._tensors(*shape), Part(MARKER, "U8", (len(self._marker()),)))

    def bits_per_weight(self, shape: tuple[int, ...]) -> float:
        """Return the stored bits per weight, with all scales and the marker."""
        return 8 * sum(part.nbytes for part in self.parts(shape)) / math.prod(shape)

    def encode(
        self,
        weight: Tensor,
        importance: Tensor | None = None,
        effort: Effort = "best",
        rounding: Rounding | None = None,
    ) -> dict[str, Tensor]:
        """Encode a weight.

        Args:
            weight: float32 (rows, columns), on any device.
            importance: float32 (columns,), factors of the squared errors. Only NVFP4 uses them.
            effort: `fast` takes the scales that ComfyUI would; `best` searches for scales with less error.
            rounding: rounds the weights in place of rounding each to the nearest level.

        Returns:
            A tensor for each of `parts`, with its dtype and shape, on the device of the weight.

        Raises:
            QuantError: the format cannot hold the weight.
        """
        self._check(tuple(weight.shape))
        if importance is not None:
            importance = importance.to(weight.device, torch.float32)
        encoded = self._encode(weight, importance, effort == "best", rounding)
        return encoded | {MARKER: torch.tensor(list(self._marker()), dtype=torch.uint8, device=weight.device)}

    @abstractmethod
    def decode(
        self, parts: Mapping[str, Tensor], shape: tuple[int, ...] | None = None, undo: Rotation = rotate_as_kitchen
    ) -> Tensor:
        """Return the weight of the tensors of a layer: float32, (rows, columns), with any rotation undone.

        Args:
            parts: as `encode` returns them.
            shape: of the weight; without it, the padding of NVFP4 and MXFP8 stays.
            undo: what undoes a rotation. By default the bits are those of kitchen's eager code.
        """

    @abstractmethod
    def _tensors(self, rows: int, columns: int) -> tuple[Part, ...]:
        """Return the tensors other than the marker."""

    @abstractmethod
    def _encode(
        self, weight: Tensor, importance: Tensor | None, search: bool, rounding: Rounding | None
    ) -> dict[str, Tensor]: ...

    def _unfit(self, rows: int, columns: int) -> str | None:
        return None

    def _check(self, shape: tuple[int, ...]) -> None:
        if reason := self.takes(shape):
            raise QuantError(f"{self.name} cannot hold a weight of {reason}; choose another type for it")

    def _marker(self) -> bytes:
        text = json.dumps(dict(self.config), separators=(",", ":")).encode()
        # So that the next tensor starts where a reader can map it.
        return text + b" " * (-len(text) % 8)


def by_rows(
    function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor, columns: int, elements: int = 0
) -> tuple[Tensor, ...]:
    """Apply a function to a few rows at a time of tensors of any dtype, (rows, any), so that temporaries stay small.

    Args:
        columns: of the weight, whose elements are counted.
        elements: how many at a time; 0 is what suits the device.

    Returns:
        The results of all rows, each as (rows, any).
    """
    n_rows, step = len(tensors[0]), max(1, (elements or elements_at_a_time(tensors[0].device)) // columns)
    results: tuple[Tensor, ...] = ()
    for first in range(0, n_rows, step):
        pieces = function(*(tensor[first : first + step] for tensor in tensors))
        # Small pieces that are kept among large temporaries would leave holes in the memory.
        results = results or tuple(piece.new_empty(n_rows, *piece.shape[1:]) for piece in pieces)
        for result, piece in zip(results, pieces, strict=True):
            result[first : first + step] = piece
    return results


def largest(weight: Tensor) -> Tensor:
    """Return the largest magnitude of a tensor of any shape: float32, a scalar, without a copy of the tensor."""
    low, high = torch.aminmax(weight)
    return torch.maximum(-low, high).float()
