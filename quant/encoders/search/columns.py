"""Sub-blocks of weights as the columns of a matrix, and the weighted sums that every error is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# No type's d exceeds 65504; weights beyond every type's reach would only overflow the sums.
_LARGEST = 2.0**24
# Only ratios of importance matter; the floor keeps a sub-block of no importance from losing its scale.
_LEAST_IMPORTANCE = 1e-4


@dataclass(frozen=True)
class Columns:
    """Weights `x` and what their squared errors weigh, `w`, both (size, n) float32; None weighs all the same.

    A sub-block is a column, so that its sums add up rows, which vectorises on every device.
    """

    x: Tensor
    w: Tensor | None = None

    @classmethod
    def of(cls, blocks: Tensor, importance: Tensor | None, size: int) -> Columns:
        """Sub-blocks of `size` weights from (n_blocks, block_size) weights and importance."""
        x = blocks.nan_to_num(0.0).clamp_(-_LARGEST, _LARGEST).reshape(-1, size).t().contiguous()
        if importance is None:
            return cls(x)
        mean = importance.mean(1, keepdim=True)
        relative = torch.where(mean > 0, importance / mean, torch.ones_like(importance)).clamp_(min=_LEAST_IMPORTANCE)
        return cls(x, relative.reshape(-1, size).t().contiguous())

    def of_blocks(self, blocks: Tensor, sub_blocks: int) -> Columns:
        """The columns of the blocks of these indices, each of which has `sub_blocks`."""

        def part(values: Tensor) -> Tensor:
            return values.view(len(values), -1, sub_blocks)[:, blocks].flatten(1)

        return Columns(part(self.x), None if self.w is None else part(self.w))

    def extreme(self) -> Tensor:
        """The weight of the largest magnitude in each column, (n,)."""
        low, high = self.x.amin(0), self.x.amax(0)
        return torch.where(high + low > 0, high, low)

    def sum(self, values: Tensor) -> Tensor:
        """(size, n) -> the weighted sum of each column, (n,)."""
        return total(values if self.w is None else values * self.w)

    def weight(self) -> Tensor:
        """The weighted count of each column, (n,)."""
        return torch.full_like(self.x[0], len(self.x)) if self.w is None else total(self.w)

    def products(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted sums of q * x and of q * q, each (n,)."""
        wq = q if self.w is None else q * self.w
        return total(wq * self.x), total(wq * q)


def total(values: Tensor) -> Tensor:
    """(2**k, n) -> the sum of each column, (n,), which does not depend on the other columns or on threads.

    `Tensor.sum` adds the columns of a vector register in another order than those left over.
    """
    while len(values) > 1:
        half = len(values) // 2
        values = values[:half] + values[half:]
    return values[0]


def inverse(values: Tensor) -> Tensor:
    """1 / values, and 0 where that is infinite: dividing by the scale of an empty sub-block gives no level but 0."""
    return values.reciprocal().nan_to_num_(0.0, 0.0, 0.0)


def least(errors: Sequence[Tensor], *candidates: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Of each list of candidates, (n, ...), the values where the errors, (n,), are least."""
    best = torch.stack(tuple(errors)).min(0).indices
    every = torch.arange(len(best), device=best.device)
    return tuple(torch.stack(tuple(values))[best, every] for values in candidates)


def float16(values: Tensor) -> Tensor:
    """Rounded to float16 and saturated there, as float32; -0 becomes +0."""
    # Which zero a search comes to may depend on whether torch worked on it in a vector or alone.
    return values.clamp(-65504.0, 65504.0).half().float().add_(0.0)
