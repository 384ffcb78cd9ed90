"""The second moments of a layer's inputs as the rounding uses them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .exact import rounded_matrix


@dataclass(frozen=True, eq=False)
class Moments:
    """The diagonal blocks of the second moments H of a layer's inputs, positive definite.

    Args:
        matrix: float64 (n, span, span); the input channels are n runs of `span`.
    """

    matrix: Tensor

    def to(self, device: torch.device) -> Moments:
        """Return these moments on a device."""
        return Moments(self.matrix.to(device))

    @functools.cached_property
    def exact(self) -> Tensor:
        """The matrix for `exact_product`, float64 (n, span, span)."""
        return rounded_matrix(self.matrix)

    @functools.cached_property
    def feedback(self) -> Tensor:
        """How an error spreads over later channels: float64 (n, span, span).

        Element (i, j) is what a unit of error in channel i adds to channel j > i. The diagonal holds the inverse of the
        cost of a unit of error in channel i, once all later channels make up for it.
        """
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.matrix))
        upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
        return upper
