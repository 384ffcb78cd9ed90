"""Matrices of the few weights that a type rounds at once, one for each run of channels."""

from __future__ import annotations

import torch
from torch import Tensor


def diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """Return the blocks along the diagonals, float32 (n, m * size, m * size) -> (n, m, size, size)."""
    n, channels, _ = matrix.shape
    blocks = matrix.view(n, channels // size, size, channels // size, size)
    return blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def triangular_inverse(matrix: Tensor) -> Tensor:
    """Invert upper triangular matrices, float32 (n, m, k, k)."""
    if matrix.shape[-1] == 1:
        return matrix.reciprocal()
    identity = torch.eye(matrix.shape[-1], dtype=torch.float64, device=matrix.device)
    inverse: Tensor = torch.linalg.solve_triangular(matrix.double(), identity, upper=True).float()
    return inverse


def root_and_inverse(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the upper triangular P with P P^T = H, and the inverse of H, for matrices H; all float32 (n, m, k, k)."""
    if matrix.shape[-1] == 1:
        return matrix.sqrt(), matrix.reciprocal()
    root = torch.linalg.cholesky(matrix.double().flip(2, 3))
    return root.flip(2, 3).float(), torch.cholesky_inverse(root).flip(2, 3).float()


def times(values: Tensor, matrix: Tensor) -> Tensor:
    """Multiply columns, float32 (n, k, rows), with transposed matrices, (n, k, k), in a fixed order."""
    product = values[:, :1] * matrix[:, 0, :, None]
    for i in range(1, matrix.shape[1]):
        product.addcmul_(matrix[:, i, :, None], values[:, i, None])
    return product
