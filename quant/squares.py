"""Sums of squares that neither overflow float32 nor depend on the number of threads."""

from __future__ import annotations

import math

from torch import Tensor


def sum_of_squares(values: Tensor) -> float:
    """Return the sum of the squares of all values; it is not finite only if a value is not.

    Args:
        values: float32, of any shape. A single value of 2e19 or more has a square beyond float32.
    """
    total = total_of(values.square())
    if math.isfinite(total):
        return total
    largest = values.abs().amax().item()
    return total_of((values / largest).square()) * largest**2 if math.isfinite(largest) else largest


def total_of(values: Tensor) -> float:
    """Return the sum of all values, the same for any number of threads.

    Args:
        values: float32, of any shape.
    """
    # Torch splits the sum of a whole tensor among its threads, but not that of a row.
    rows = values.reshape(-1, values.shape[-1] if values.ndim else 1)
    return math.fsum(rows.sum(1).tolist())
