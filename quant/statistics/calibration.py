"""Calibrations: the second-moment matrices of the inputs of every Linear, for GPTQ-style rounding.

For inputs X (tokens, in_features), the squared error of a layer's outputs is quadratic in the error of its weight. Its
matrix is X^T X, the Gram matrix of the inputs, which GPTQ calls the Hessian. The diagonal of X^T X is the importance
matrix; its other elements say how correlated two input channels are. Where they are correlated, the rounding error of
one weight can be compensated by the weights of the later channels.

A full X^T X is large, so only its diagonal blocks of `SPAN` channels are kept. Channels of one block (a "span")
compensate for each other, those of different blocks do not.

A conversion takes a `Calibration` in place of an importance matrix. `Calibration.moments` prepares the matrices for the
encoder, which then rounds a weight column by column.

Source: GPTQ (arXiv 2210.17323).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import QuantError
from ..gguf.provenance import CALIBRATED
from .importance import Collector, Importance

SPAN = 256
"""Input channels per diagonal block, as many as a super-block has weights.

For Wan 14B, a calibration has 1.5 GiB; the full matrices would have 48 GiB.
"""

# The most tokens that are used of one evaluation of the model. A block of 256 channels needs a few thousand tokens in
# all, which a few steps of one clip have.
_TOKENS = 1 << 10
# The fraction of the mean of a block's diagonal that is added to the diagonal, as in GPTQ. Without it, sums in float32
# are not positive definite.
_DAMPING = 0.01


@dataclass(frozen=True, eq=False)
class Calibration(Importance):
    """An importance matrix with the diagonal blocks of the Gram matrix X^T X of each layer's inputs."""

    products: Mapping[str, Tensor] = field(default_factory=dict)
    """float32, (in_features / span, span, span): sums of x x^T over all tokens; their diagonals are `sums`.

    `span` is the greatest common divisor of `SPAN` and in_features.
    """

    @property
    def metadata(self) -> dict[str, Any]:
        return {**super().metadata, CALIBRATED: True}

    def moments(self, name: str) -> Tensor:
        """Return the diagonal blocks of X^T X / tokens with a damped diagonal, as GPTQ uses them.

        Returns:
            float64, (in_features / span, span, span), on the CPU.

        Raises:
            QuantError: a block is not positive definite, which sums of x x^T always are once they are damped.
        """
        moments = self.products[name].double() / self.counts[name]
        scale = moments.diagonal(dim1=1, dim2=2).mean(1)
        damping = torch.where(scale > 0, _DAMPING * scale, 1.0)
        moments.diagonal(dim1=1, dim2=2).add_(damping[:, None])
        _, failed = torch.linalg.cholesky_ex(moments)
        if failed.any():
            raise QuantError(
                f"{self.name}: tensor {name}: got a matrix that is not positive definite, expected the Gram matrix"
                " (X^T X) of the layer's inputs; collect the calibration again"
            )
        return moments


class CalibrationCollector(Collector):
    """A collector of the diagonal blocks of X^T X while a model runs.

    Each evaluation adds at most 1024 tokens per layer.
    """

    def add(self, name: str, inputs: Tensor, weight: float = 1.0) -> None:
        """Add tokens at even distances of one call of a layer; the arguments are those of `Collector.add`."""
        tokens = inputs.detach().reshape(-1, inputs.shape[-1])
        step = math.ceil(len(tokens) / _TOKENS)
        # The next evaluation starts at the next token, so that it adds other ones.
        super().add(name, tokens[self.samples % step :: step], weight)

    def result(self) -> Calibration:
        collected = super().result()
        diagonals = {name: products.diagonal(dim1=1, dim2=2).flatten() for name, products in collected.sums.items()}
        return Calibration(diagonals, collected.counts, collected.samples, products=collected.sums)

    @staticmethod
    def measure(inputs: Tensor) -> Tensor:
        """Return the diagonal blocks of X^T X: see `gram_blocks`."""
        return gram_blocks(inputs)


def gram_blocks(inputs: Tensor) -> Tensor:
    """Return the diagonal blocks of X^T X, on the CPU because those of all layers would fill an accelerator.

    Args:
        inputs: floating point, (tokens, in_features).

    Returns:
        float32, (in_features / span, span, span).
    """
    span = math.gcd(inputs.shape[-1], SPAN)
    spans = inputs.float().view(len(inputs), -1, span).permute(1, 2, 0)
    return (spans @ spans.mT).cpu()
