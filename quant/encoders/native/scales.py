"""The scales that groups of weights can have in ComfyUI's formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...native.float8 import LEAST_POWER, MAX_E4M3_CODE, block_scales, e4m3_values, nearest_e4m3

_LEAST_E4M3 = 2.0**-9


@dataclass(frozen=True)
class One:
    """The only scale of a format without scales of groups."""

    is_fixed: ClassVar[bool] = True

    def nearest(self, values: Tensor) -> Tensor:
        """Return 1 for each value, float32 of the same shape."""
        return torch.ones_like(values)

    def moved(self, values: Tensor, steps: int) -> Tensor:
        """Return 1 for each value, float32 of the same shape."""
        return torch.ones_like(values)


@dataclass(frozen=True)
class E4M3Scales:
    """The positive E4M3 floats."""

    is_fixed: ClassVar[bool] = False

    def nearest(self, values: Tensor) -> Tensor:
        """Return the scale nearest to each value, float32 of the same shape."""
        return nearest_e4m3(values.clamp(min=_LEAST_E4M3)).float()

    def moved(self, values: Tensor, steps: int) -> Tensor:
        """Return the scales so many neighbors away, or the last one: float32, of the shape of `values`."""
        codes = values.to(torch.float8_e4m3fn).view(torch.uint8).int() + steps
        return e4m3_values(codes.clamp_(1, MAX_E4M3_CODE).to(torch.uint8))


@dataclass(frozen=True)
class PowersOfTwo:
    """Powers of two. As levels are floats, the least that does not cut the largest weight is as good as any."""

    is_fixed: ClassVar[bool] = False

    def nearest(self, values: Tensor) -> Tensor:
        """Return the least power of two that is not below each value, float32 of the same shape."""
        return block_scales(values * 448).clamp_(min=LEAST_POWER)

    def moved(self, values: Tensor, steps: int) -> Tensor:
        """Return the values, float32 of any shape, as they are."""
        return values
