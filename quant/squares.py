"""Sums of squares that do not overflow float32."""

from __future__ import annotations

import math

from torch import Tensor


def sum_of_squares(values: Tensor) -> float:
    """Return the sum of the squares of all values; it is not finite only if a value is not.

    Args:
        values: float32, of any shape. A single value of 2e19 or more has a square beyond float32.
    """
    total = values.square().sum().item()
    if math.isfinite(total):
        return total
    largest = values.abs().amax().item()
    return (values / largest).square().sum().item() * largest**2 if math.isfinite(largest) else largest
