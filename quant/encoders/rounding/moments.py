"""The second moments of a layer's inputs as the rounding uses them.

H consists of diagonal blocks for runs of input channels (spans), plus F F^T for a matrix F of few columns. The spans
are rounded in a few turns, half of those that are left at a time. A turn does two things about the others:

- its channels make up for the errors that the turns before have left in F^T e;
- its own errors count as much as they will once the later turns have made up for them.

Both follow from H without the channels that are not rounded yet, by the matrix inversion lemma.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...device import one_thread
from .exact import rounded_matrix


@dataclass(frozen=True, eq=False)
class SpanMoments:
    """The second moments of some spans, positive definite.

    Args:
        matrix: float64 (n, span, span).
    """

    matrix: Tensor

    @functools.cached_property
    def exact(self) -> Tensor:
        """The matrix for `exact_product`, float64 (n, span, span)."""
        return rounded_matrix(self.matrix)

    @functools.cached_property
    @one_thread()
    def feedback(self) -> Tensor:
        """How an error spreads over later channels: float64 (n, span, span).

        Element (i, j) is what a unit of error in channel i adds to channel j > i. The diagonal holds the inverse of the
        cost of a unit of error in channel i, once all later channels make up for it.
        """
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.matrix))
        upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
        return upper


@dataclass(frozen=True, eq=False)
class Turn:
    """Spans that are rounded at the same time.

    Args:
        spans: which of all spans.
        moments: their second moments, once the later turns make up for their errors.
        factors: float64 (n, rank, span), rounded: what their errors leave in F^T e.
        answer: float64 (n, span, rank), rounded: by how much they move for F^T e of the turns before.
    """

    spans: slice
    moments: SpanMoments
    factors: Tensor
    answer: Tensor


@dataclass(frozen=True, eq=False)
class Moments:
    """The second moments H of a layer's inputs.

    Args:
        blocks: float64 (n, span, span), positive definite; the input channels are n runs of `span`.
        factors: float64 (n, span, rank), the parts of F; the rank may be 0.
    """

    blocks: Tensor
    factors: Tensor

    def to(self, device: torch.device) -> Moments:
        """Return these moments on a device."""
        if self.blocks.device == device:
            return self
        return replace(self, blocks=self.blocks.to(device), factors=self.factors.to(device))

    @functools.cached_property
    @one_thread()
    def turns(self) -> list[Turn]:
        """The spans in their order; without factors, all of them in one turn."""
        if self.factors.shape[2] == 0:
            everything, nothing = slice(0, len(self.blocks)), self.factors.mT
            return [Turn(everything, SpanMoments(self.blocks), nothing, self.factors)]
        return list(self._turns())[::-1]

    def _turns(self) -> Iterator[Turn]:
        """Yield the turns, the last one first."""
        solved = torch.cholesky_solve(self.factors, torch.linalg.cholesky(self.blocks))
        capacities = self.factors.mT @ solved
        # 1 + F^T B^-1 F over the channels of the turns after.
        later = torch.eye(self.factors.shape[2], dtype=torch.float64, device=self.factors.device)
        for spans in reversed(_halves(len(self.blocks))):
            factors = self.factors[spans]
            matrix = self.blocks[spans] + factors @ torch.linalg.inv(later) @ factors.mT
            # The spans of a turn share what there is to make up for.
            later = later + capacities[spans].sum(0)
            answer = solved[spans] @ torch.linalg.inv(later)
            yield Turn(spans, SpanMoments(matrix), rounded_matrix(factors.mT), rounded_matrix(answer))


def _halves(n: int) -> list[slice]:
    """Return runs of n spans, each with half of those that are left."""
    runs, start = [], 0
    while start < n:
        stop = start + (n - start + 1) // 2
        runs.append(slice(start, stop))
        start = stop
    return runs
