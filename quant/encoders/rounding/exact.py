"""Products of matrices whose sums have no rounding errors, so that their bits depend on neither order nor threads."""

from __future__ import annotations

import torch
from torch import Tensor

from ..search.sub_blocks import pairwise_sum

# Two factors of 22 bits have products of 44. Sums of 256 of these still fit into the 53 bits of a float64.
_BITS = 22


def rounded_matrix(matrix: Tensor) -> Tensor:
    """Round each matrix to 22 bits of its largest element: floating point (n, m, k) -> float64 (n, m, k)."""
    return _to_bits(matrix.double(), matrix.abs().amax((1, 2), keepdim=True))


def exact_product(matrix: Tensor, values: Tensor) -> Tensor:
    """Multiply matrices with values, which are rounded to 22 bits of the largest that a row has in these channels.

    Args:
        matrix: float64 (n, m, k) from `rounded_matrix`, where k is at most 256.
        values: float32 (n, k, rows).

    Returns:
        float32 (n, m, rows).
    """
    return (matrix @ _to_bits(values.double(), values.abs().amax(1, keepdim=True))).float()


def _to_bits(values: Tensor, largest: Tensor) -> Tensor:
    """Round float64 values to multiples of 2**-22 times the power of two above `largest`, which is broadcast."""
    # Adding a number whose last bit is that multiple rounds to it; subtracting it again is exact.
    anchor = torch.ldexp(torch.full_like(largest, 1.5, dtype=torch.float64), torch.frexp(largest).exponent + 52 - _BITS)
    return values.add_(anchor).sub_(anchor)


def sum_channels(values: Tensor) -> Tensor:
    """Return the sums over 2**k channels in a fixed order, float32 (n, 2**k, rows) -> (n, rows)."""
    return pairwise_sum(values.transpose(0, 1))
