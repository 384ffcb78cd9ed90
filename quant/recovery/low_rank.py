"""The low-rank matrices that stand best for given errors, and the ranks that many of them get within a size.

Source: arXiv 2402.02446 (LQER) and 2410.06040 (QERA-approx) for the weights of the columns; arXiv 0909.4061,
algorithm 4.4, for the subspace.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

DTYPE = torch.bfloat16
_OVERSAMPLING, _ITERATIONS = 8, 3


@dataclass(frozen=True)
class Part:
    """One layer's share of the LoRA."""

    name: str
    """Of the layer's weight."""
    up: Tensor
    """(rows, rank)"""
    down: Tensor
    """(rank, columns)"""
    gains: Tensor
    """float32 (rank,), falling: the squared error of the outputs that each rank takes away."""
    error: float
    """Squared, of the outputs, without the LoRA."""

    @property
    def rank_bytes(self) -> int:
        return (self.up.shape[0] + self.down.shape[1]) * DTYPE.itemsize

    @property
    def remaining(self) -> float:
        """The squared error with the LoRA."""
        return max(0.0, self.error - self.gains.sum().item())

    @classmethod
    def of(cls, name: str, error: Tensor, importance: Tensor, rank: int) -> Part:
        """The first ranks of an error (rows, columns) for inputs of mean square `importance`, (columns,)."""
        up, down, gains = low_rank(error, importance, rank)
        # Both factors of one size, which keeps them far from the ends of any dtype's range.
        balance = down.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
        up, down = (up * balance).to("cpu", DTYPE), (down / balance[:, None]).to("cpu", DTYPE)
        total = (error.square() * importance).sum().item()
        return cls(name, up, down, gains.cpu(), total).cut(int((gains > 0).sum()))

    def cut(self, rank: int) -> Part:
        # Copies, so that the memory of what is cut off is freed.
        return replace(self, up=self.up[:, :rank].clone(), down=self.down[:rank].clone(), gains=self.gains[:rank])


def low_rank(error: Tensor, importance: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best approximation of `error` (rows, columns) where column j counts `importance[j]` times.

    Returns:
        Orthonormal (rows, rank) times (rank, columns), and the (rank,) weighted squares that each rank explains.
    """
    weighted = error * importance.sqrt()
    width = min(rank + _OVERSAMPLING, *error.shape)
    generator = torch.Generator().manual_seed(0)
    basis = weighted @ torch.randn(error.shape[1], width, generator=generator).to(error.device)
    for _ in range(_ITERATIONS):
        basis = weighted @ (weighted.T @ torch.linalg.qr(basis).Q)
    basis = torch.linalg.qr(basis).Q
    turn, sizes, _ = torch.linalg.svd(basis.T @ weighted, full_matrices=False)
    up = basis @ turn[:, :rank]
    # Projected without the weights, so that none is divided by: a column that is always 0 has weight 0.
    return up, up.T @ error, sizes[:rank].square()


def fit(parts: list[Part], nbytes: int) -> list[Part]:
    """The ranks that take away most error for their bytes, as many as fit."""
    owner = torch.cat([torch.full((len(part.gains),), index) for index, part in enumerate(parts)])
    costs = torch.tensor([part.rank_bytes for part in parts])[owner]
    order = (torch.cat([part.gains for part in parts]) / costs).argsort(descending=True, stable=True)
    taken = owner[order[costs[order].cumsum(0) <= nbytes]]
    ranks = taken.bincount(minlength=len(parts)).tolist()
    return [part.cut(rank) if rank < len(part.gains) else part for part, rank in zip(parts, ranks, strict=True)]
