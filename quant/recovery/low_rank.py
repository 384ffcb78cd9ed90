"""Low-rank corrections of quantization errors, and the choice of their ranks within a file size.

The correction of a layer is a product of two thin matrices that approximates the error of its weight. The approximation
is best for the layer's outputs, given the mean square of each input channel: the error is scaled by the roots of the
mean squares, and its largest singular values are kept.

Source: arXiv 2402.02446 (LQER) and 2410.06040 (QERA-approx) for the scaling by the input channels; arXiv 0909.4061,
algorithm 4.4, for the randomized subspace iteration.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

DTYPE = torch.bfloat16
_OVERSAMPLING, _ITERATIONS = 8, 3


@dataclass(frozen=True)
class LowRankCorrection:
    """The low-rank correction of one layer's weight: `up @ down` approximates the quantization error."""

    name: str
    """The name of the layer's weight."""
    up: Tensor
    """bfloat16, (out_features, rank)."""
    down: Tensor
    """bfloat16, (rank, in_features)."""
    removed: Tensor
    """float32, (rank,), descending: the squared error of the outputs that each rank removes."""
    error: float
    """The squared error of the outputs without the correction."""

    @property
    def rank(self) -> int:
        return len(self.removed)

    @property
    def rank_bytes(self) -> int:
        """The bytes of one rank."""
        return (self.up.shape[0] + self.down.shape[1]) * DTYPE.itemsize

    @property
    def remaining(self) -> float:
        """The squared error of the outputs with the correction."""
        return max(0.0, self.error - self.removed.sum().item())

    @classmethod
    def of(cls, name: str, error: Tensor, importance: Tensor, rank: int) -> LowRankCorrection:
        """Return the correction of at most `rank` ranks, on the CPU.

        Args:
            name: the name of the layer's weight.
            error: float32, (out_features, in_features), the weight minus the quantized weight.
            importance: float32, (in_features,), the mean square of each input channel.
            rank: the largest rank; ranks that remove nothing are left out.
        """
        up, down, removed = low_rank_approximation(error, importance, rank)
        # Both factors get the same norm, which keeps their values far from the ends of the range of any dtype.
        balance = down.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
        up, down = (up * balance).to("cpu", DTYPE), (down / balance[:, None]).to("cpu", DTYPE)
        total = (error.square() * importance).sum().item()
        return cls(name, up, down, removed.cpu(), total).truncate(int((removed > 0).sum()))

    def truncate(self, rank: int) -> LowRankCorrection:
        """Return the correction with its first `rank` ranks only."""
        # Copies, so that the memory of the other ranks is freed.
        return replace(self, up=self.up[:, :rank].clone(), down=self.down[:rank].clone(), removed=self.removed[:rank])


def low_rank_approximation(error: Tensor, importance: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best rank-`rank` approximation of `error` for inputs with the mean squares `importance`.

    Args:
        error: float32, (out_features, in_features).
        importance: float32, (in_features,).
        rank: the rank of the approximation.

    Returns:
        `up`, float32, (out_features, rank), with orthonormal columns; `down`, float32, (rank, in_features); and the
        weighted squared error that each rank removes, float32, (rank,), descending.
    """
    weighted = error * importance.sqrt()
    width = min(rank + _OVERSAMPLING, *error.shape)
    # torch.svd_lowrank is not used because it draws from the global random state.
    generator = torch.Generator().manual_seed(0)
    basis = weighted @ torch.randn(error.shape[1], width, generator=generator).to(error.device)
    for _ in range(_ITERATIONS):
        basis = weighted @ (weighted.T @ torch.linalg.qr(basis).Q)
    basis = torch.linalg.qr(basis).Q
    rotation, singular_values, _ = torch.linalg.svd(basis.T @ weighted, full_matrices=False)
    up = basis @ rotation[:, :rank]
    # `down` is the projection of the unweighted error. Undoing the weighting instead would divide by 0 where an input
    # channel is always 0.
    return up, up.T @ error, singular_values[:rank].square()


def choose_ranks(corrections: list[LowRankCorrection], nbytes: int) -> list[LowRankCorrection]:
    """Truncate the corrections to `nbytes` in total: ranks that remove the most error per byte are kept."""
    owner = torch.cat([torch.full((correction.rank,), index) for index, correction in enumerate(corrections)])
    costs = torch.tensor([correction.rank_bytes for correction in corrections])[owner]
    removed = torch.cat([correction.removed for correction in corrections])
    order = (removed / costs).argsort(descending=True, stable=True)
    kept = owner[order[costs[order].cumsum(0) <= nbytes]]
    ranks = kept.bincount(minlength=len(corrections)).tolist()
    return [
        correction.truncate(rank) if rank < correction.rank else correction
        for correction, rank in zip(corrections, ranks, strict=True)
    ]
