"""Weights cut into sub-blocks, and the weighted sums that squared errors and least squares are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# The float16 factor d of a type is at most 65504. Weights beyond the reach of every type would only overflow the sums.
_MAX_MAGNITUDE = 2.0**24
# Only ratios of importance matter. Without a floor, a sub-block of importance 0 would get no scale.
_MIN_IMPORTANCE = 1e-4


@dataclass(frozen=True)
class SubBlocks:
    """n sub-blocks of weights, each a column of a matrix, and the importance of each weight.

    Sums over a sub-block then add whole rows of the matrix, which every device does with vector instructions.

    Args:
        x: the weights, float32 (size, n).
        w: their importance in the squared error, float32 (size, n); None counts all weights alike.
    """

    x: Tensor
    w: Tensor | None = None

    @classmethod
    def from_blocks(cls, blocks: Tensor, importance: Tensor | None, size: int) -> SubBlocks:
        """Cut blocks into sub-blocks of `size` weights; NaN becomes 0.

        Args:
            blocks: float32 (n_blocks, block_size).
            importance: float32 (n_blocks, block_size), or None.
        """
        x = blocks.nan_to_num(0.0).clamp_(-_MAX_MAGNITUDE, _MAX_MAGNITUDE).reshape(-1, size).t().contiguous()
        if importance is None:
            return cls(x)
        # A mean along another axis of memory could depend on the number of blocks.
        mean = importance.contiguous().mean(1, keepdim=True)
        relative = torch.where(mean > 0, importance / mean, torch.ones_like(importance)).clamp_(min=_MIN_IMPORTANCE)
        return cls(x, relative.reshape(-1, size).t().contiguous())

    def split(self, step: int) -> Iterator[SubBlocks]:
        """Yield `step` sub-blocks at a time."""
        x = torch.split(self.x, step, 1)
        yield from map(SubBlocks, x, [None] * len(x) if self.w is None else torch.split(self.w, step, 1))

    def select_blocks(self, indices: Tensor, per_block: int) -> SubBlocks:
        """Return the sub-blocks of some blocks.

        Args:
            indices: int64 (k,), the numbers of the blocks.
            per_block: the number of sub-blocks of each block.
        """

        def select(values: Tensor) -> Tensor:
            return values.view(len(values), -1, per_block)[:, indices].flatten(1)

        return SubBlocks(select(self.x), None if self.w is None else select(self.w))

    def signed_amax(self) -> Tensor:
        """Return the weight of the largest magnitude in each sub-block with its sign, float32 (n,)."""
        low, high = self.x.amin(0), self.x.amax(0)
        return torch.where(high + low > 0, high, low)

    def weighted_sum(self, values: Tensor) -> Tensor:
        """Return the sum of w * values over each sub-block, float32 (size, n) -> (n,)."""
        return pairwise_sum(values if self.w is None else values * self.w)

    def total_importance(self) -> Tensor:
        """Return the sum of w over each sub-block, float32 (n,): its size where all weights count alike."""
        return torch.full_like(self.x[0], len(self.x)) if self.w is None else pairwise_sum(self.w)

    def weighted_products(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums of w * q * x and of w * q * q over each sub-block, float32 (n,), for q (size, n)."""
        wq = q if self.w is None else q * self.w
        return pairwise_sum(wq * self.x), pairwise_sum(wq * q)


def pairwise_sum(values: Tensor) -> Tensor:
    """Add all rows of a float32 (2**k, n) tensor; the bits of a sum do not depend on the other columns or on threads.

    `Tensor.sum` would not do: it adds the columns that fill a vector register in another order than the remaining ones.
    """
    while len(values) > 1:
        half = len(values) // 2
        values = values[:half] + values[half:]
    return values[0]


def reciprocal_or_zero(values: Tensor) -> Tensor:
    """Return 1 / values, float32 of the same shape, and 0 where that is infinite: an empty sub-block gets level 0."""
    return values.reciprocal().nan_to_num_(0.0, 0.0, 0.0)


def select_best(errors: Sequence[Tensor], *options: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return from each list of options, for each of n items, the values of the option with the least error.

    Args:
        errors: for each option its errors, float32 (n,).
        options: lists as long as `errors` of tensors (n, ...).
    """
    best = torch.stack(tuple(errors)).min(0).indices
    items = torch.arange(len(best), device=best.device)
    return tuple(torch.stack(tuple(values))[best, items] for values in options)


def round_to_float16(values: Tensor) -> Tensor:
    """Round float32 values of any shape to the nearest finite float16, still as float32; -0 becomes +0."""
    # Torch may compute a value in a vector register or alone, and the sign of a zero may depend on which.
    return values.clamp(-65504.0, 65504.0).half().float().add_(0.0)
