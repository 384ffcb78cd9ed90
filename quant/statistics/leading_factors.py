"""The leading eigenvectors of the covariances of a layer's inputs, from a sketch that needs one pass over the inputs.

For inputs X (tokens, in_features), the sketch is X^T X Omega with a random matrix Omega of a few columns. It is a sum
over tokens, so that it needs no more memory for more of them, and X^T X itself is never formed.

Source: Tropp, Yurtsever, Udell, Cevher, Fixed-Rank Approximation of a Positive-Semidefinite Matrix from Streaming Data
(arXiv 1706.05736), algorithm 3.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

RANK = 64
"""The number of eigenvectors. With those of all layers, a calibration of Wan 14B is 0.4 GiB larger."""
# Twice as many as the eigenvectors, as the source recommends for spectra that decay slowly.
_COLUMNS = 2 * RANK
# Relative to the norm of the sketch; above the rounding errors of sums in float32.
_SHIFT = 1e-7


def sketch(inputs: Tensor) -> Tensor:
    """Return the sketch of X^T X.

    Args:
        inputs: float32 (tokens, in_features).

    Returns:
        float32 (in_features, n), on the same device.
    """
    return inputs.mT @ (inputs @ _test_matrix(inputs.shape[1]).to(inputs.device))


def leading_factors(sketched: Tensor, total: Tensor, count: float) -> Tensor:
    """Return F such that F F^T is the leading part of the covariances, and the rest is positive but for rounding.

    Args:
        sketched: float32 (in_features, n), the sum of the sketches.
        total: float32 (in_features,), the sum of the inputs.
        count: the number of tokens.

    Returns:
        float32 (in_features, rank): eigenvectors, each times the root of its eigenvalue; the largest comes first.
    """
    test, mean = _test_matrix(len(total)).double(), total.double() / count
    centered = sketched.double() / count - mean[:, None] * (mean @ test)
    # Shifted by a multiple of the identity, so that the small matrix has a Cholesky factor.
    shift = _SHIFT * float(centered.norm())
    if shift == 0:
        return torch.zeros(len(total), RANK)
    shifted = centered + shift * test
    small = test.mT @ shifted
    root, failed = torch.linalg.cholesky_ex((small + small.mT) / 2)
    if failed:
        return torch.zeros(len(total), RANK)
    vectors, values, _ = torch.linalg.svd(torch.linalg.solve_triangular(root, shifted.mT, upper=False).mT, False)
    strengths = (values.square() - shift).clamp(min=0).sqrt()
    factors: Tensor = (vectors * strengths)[:, :RANK].float()
    return factors.contiguous()


@functools.lru_cache(8)
def _test_matrix(in_features: int) -> Tensor:
    """Return Omega: float32 (in_features, n), the same in every run."""
    columns = min(in_features, _COLUMNS)
    return torch.randn(in_features, columns, generator=torch.Generator().manual_seed(in_features))
