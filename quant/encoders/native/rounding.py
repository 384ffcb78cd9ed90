"""The rounding of a weight in one of ComfyUI's formats for the least error of its layer's outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...native.native_format import NativeFormat
from ...native.rowwise import RowScaled
from ..rounding import Moments, Thoroughness, round_spans
from ..rounding.exact import exact_product, rounded_matrix, sum_channels
from ..search.sub_blocks import reciprocal_or_zero
from .grids import grid_of


@dataclass(frozen=True)
class RoundingForOutputs:
    """A `Rounding` of native formats.

    Args:
        importance: float32 (columns,), the mean square of each input channel.
        moments: of the inputs as the layer multiplies them: rotated where the format rotates.
        how: how much is tried.
    """

    importance: Tensor
    moments: Moments
    how: Thoroughness

    def takes(self, native: NativeFormat) -> bool:
        """Return whether the groups of a format fit into the spans of the moments."""
        return self.moments.blocks.shape[2] % grid_of(native).size == 0

    def __call__(self, native: NativeFormat, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Round rows.

        Args:
            weight: float32 (rows, columns), in units of each row's scale.

        Returns:
            The levels, float32 (rows, columns), the scales of groups, (rows, groups), and the factors by which the
            rows' scales change, (rows, 1).
        """
        grid = grid_of(native)
        importance = self.importance.expand_as(weight)
        spans = list(round_spans(grid, grid.size, weight, importance, self.moments, self.how))
        levels, scales = (
            torch.cat(parts).flatten(0, 1).t()
            for parts in ([span.levels for span in spans], [span.scales for span in spans])
        )
        if isinstance(native, RowScaled):
            levels = _with_top(levels, weight, native.top)
        if not native.rotates:
            return levels.contiguous(), scales.contiguous(), torch.ones_like(weight[:, :1])
        values = levels
        return levels.contiguous(), scales.contiguous(), self._factors(weight, values)

    def _factors(self, weight: Tensor, values: Tensor) -> Tensor:
        """Return by how much to enlarge each row for the least error: float32, (rows, 1)."""
        n, _, rank = self.moments.factors.shape
        wanted = squares = weight.new_zeros(len(weight))
        left = [weight.new_zeros(1, rank, len(weight)) for _ in range(2)]
        for span in range(n):
            channels = slice(span * self.moments.blocks.shape[1], (span + 1) * self.moments.blocks.shape[1])
            q, w = values[:, channels].t()[None].contiguous(), weight[:, channels].t()[None].contiguous()
            product = exact_product(rounded_matrix(self.moments.blocks[span, None].clone()), q)
            wanted, squares = wanted + sum_channels(product * w)[0], squares + sum_channels(product * q)[0]
            if rank:
                factors = rounded_matrix(self.moments.factors[span, None].mT.clone())
                left = [each + exact_product(factors, part) for each, part in zip(left, (q, w), strict=True)]
        for of_q, of_w in zip(*(each[0] for each in left), strict=True):
            wanted, squares = wanted + of_q * of_w, squares + of_q * of_q
        return torch.where((wanted > 0) & (squares > 0), wanted * reciprocal_or_zero(squares), 1.0)[:, None]


def _with_top(levels: Tensor, weight: Tensor, top: int) -> Tensor:
    """Return the levels, where the largest of each row has the code `top`.

    ComfyUI derives the scale of a row from it anew when it adds a LoRA, and then finds the same one.
    """
    column = levels.abs().argmax(1, keepdim=True)
    largest = levels.gather(1, column)
    return levels.scatter(1, column, torch.where(largest.abs() > 0, largest.sign() * top, 0.0))
