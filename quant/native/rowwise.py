"""INT8 and INT4: signed integers with one scale per row, after a rotation.

Source: comfy_kitchen 0.2.40 backends/eager/quantization.py and convrot_w4a4.py.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .native_format import ROUNDED_ELEMENTS, TINY, NativeFormat, Part, Rounding, by_rows
from .packing import pack_nibbles, unpack_signed_nibbles
from .rotation import Rotation, not_rotatable, rotate, rotate_as_kitchen


@dataclass(frozen=True)
class RowScaled(NativeFormat):
    """Integers from -`top` to `top` with one scale per row."""

    top: int
    zero_scale: float
    """The scale of a row of zeros, which is kitchen's."""
    coarse: tuple[float, ...]
    """The scales to try first, relative to the one that maps the largest magnitude to `top`."""
    fine: tuple[float, ...]
    """Steps from the best scale so far, each tried in both directions."""
    rotates: ClassVar[bool] = True
    free_scale: ClassVar[str] = "weight_scale"

    def decode(
        self, parts: Mapping[str, Tensor], shape: tuple[int, ...] | None = None, undo: Rotation = rotate_as_kitchen
    ) -> Tensor:
        weight = parts["weight"]
        scales = parts["weight_scale"].view(-1, 1)

        def values(weight: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
            return (undo(self._unpack(weight).float() * scales),)

        return by_rows(values, weight, scales, columns=weight.shape[1])[0]

    def _unfit(self, rows: int, columns: int) -> str | None:
        return not_rotatable(columns)

    def _encode(
        self, weight: Tensor, importance: Tensor | None, search: bool, rounding: Rounding | None
    ) -> dict[str, Tensor]:
        def encode(rows: Tensor) -> tuple[Tensor, ...]:
            rotated = rotate(rows.float())
            amax = torch.linalg.vector_norm(rotated, torch.inf, 1, keepdim=True)
            scales = torch.where(amax > 0, (amax / self.top).clamp_(min=TINY), self.zero_scale)
            if search:
                scales = self._best_scales(rotated, amax, scales)
            codes = rotated.div_(scales)
            if rounding is not None:
                codes, _, factors = rounding(self, codes)
                scales = scales * factors
            return self._pack(codes.round_().clamp_(-self.top, self.top).to(torch.int8)), scales

        elements = 0 if rounding is None else ROUNDED_ELEMENTS
        codes, scales = by_rows(encode, weight, columns=weight.shape[1], elements=elements)
        return {"weight": codes, "weight_scale": scales.view(self._scale_shape(len(scales)))}

    def _best_scales(self, rows: Tensor, amax: Tensor, first: Tensor) -> Tensor:
        """Return the scales with the least error: float32, (n, 1).

        At every one the largest magnitude of a row still has the code `top`. ComfyUI derives the scale from it anew
        when it adds a LoRA, and then finds the same one.
        """
        best = first, self._error(rows, first)
        for factor in self.coarse:
            best = self._better(rows, amax, first * factor, *best)
        for step in (signed for fine in self.fine for signed in (-fine, fine)):
            best = self._better(rows, amax, best[0] * (1 + step), *best)
        return self._better(rows, amax, self._least_squares(rows, best[0]), *best)[0]

    def _better(self, rows: Tensor, amax: Tensor, scales: Tensor, best: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scales and the errors of `best`, but those of `scales` where these are better and allowed."""
        error = self._error(rows, scales)
        better = (error < least) & ((amax / scales).round_() >= self.top)
        return torch.where(better, scales, best), torch.where(better, error, least)

    def _error(self, rows: Tensor, scales: Tensor) -> Tensor:
        """Return the root of the sum of squared errors of each row: float32, (n, 1)."""
        scaled = rows / scales
        difference = scaled.round().clamp_(-self.top, self.top).sub_(scaled)
        # In steps of the scale, squares neither overflow nor vanish, however large the weights are.
        steps: Tensor = torch.linalg.vector_norm(difference, dim=1, keepdim=True)
        return steps * scales

    def _least_squares(self, rows: Tensor, scales: Tensor) -> Tensor:
        """Return the best scales of the codes that these scales give: float32, (n, 1)."""
        scaled = rows / scales
        codes = scaled.round().clamp_(-self.top, self.top)
        factor = scaled.mul_(codes).sum(1, keepdim=True) / codes.square_().sum(1, keepdim=True)
        return scales * factor

    @abstractmethod
    def _pack(self, codes: Tensor) -> Tensor: ...

    @abstractmethod
    def _unpack(self, weight: Tensor) -> Tensor: ...

    @abstractmethod
    def _scale_shape(self, rows: int) -> tuple[int, ...]: ...


class INT8(RowScaled):
    """Integers of 8 bits."""

    def _tensors(self, rows: int, columns: int) -> tuple[Part, ...]:
        return Part("weight", "I8", (rows, columns)), Part("weight_scale", "F32", self._scale_shape(rows))

    def _pack(self, codes: Tensor) -> Tensor:
        return codes

    def _unpack(self, weight: Tensor) -> Tensor:
        return weight

    def _scale_shape(self, rows: int) -> tuple[int, ...]:
        return rows, 1


class INT4(RowScaled):
    """Integers of 4 bits, two to a byte."""

    def _tensors(self, rows: int, columns: int) -> tuple[Part, ...]:
        return Part("weight", "I8", (rows, columns // 2)), Part("weight_scale", "F32", self._scale_shape(rows))

    def _pack(self, codes: Tensor) -> Tensor:
        return pack_nibbles(codes.view(torch.uint8)).view(torch.int8)

    def _unpack(self, weight: Tensor) -> Tensor:
        return unpack_signed_nibbles(weight)

    def _scale_shape(self, rows: int) -> tuple[int, ...]:
        return (rows,)
