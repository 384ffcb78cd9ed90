"""Calibrations: the second-moment matrices of the inputs of every Linear, for GPTQ-style rounding.

For inputs X (tokens, in_features), the squared error of a layer's outputs is quadratic in the error of its weight. Its
matrix is X^T X, the Gram matrix of the inputs, which GPTQ calls the Hessian. The diagonal of X^T X is the importance
matrix; its other elements say how correlated two input channels are. Where they are correlated, the rounding error of
one weight can be compensated by the weights of the later channels.

A full X^T X is large, so only two parts of it are kept: its diagonal blocks of `SPAN` channels ("spans"), and its
leading eigenvectors. The eigenvectors say how channels of different spans belong together: see `leading_factors`.

A few tokens are held out: they are in none of the sums. A conversion tries its roundings on them: see `HeldOut`.

A conversion takes a `Calibration` in place of an importance matrix, and rounds each weight column by column for it.

Source: GPTQ (arXiv 2210.17323).
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..gguf.provenance import CALIBRATED, CALIBRATION_SHA256
from ..native.rotation import rotate
from .held_out import HeldOut
from .importance import Collector, Importance
from .leading_factors import leading_factors, sketch

SPAN = 256
"""Input channels per diagonal block, as many as a super-block has weights.

For Wan 14B, the spans have 1.5 GiB; the full matrices would have 48 GiB.
"""

# The most tokens that are used of one evaluation of the model. A block of 256 channels needs a few thousand tokens in
# all, which a few steps of one clip have.
_TOKENS = 1 << 10
# The share of the factors that is used. With all of it, rounding errors could make the rest of a matrix negative.
_KEPT = 0.999


class SecondMoments(NamedTuple):
    """The second moments of a layer's inputs, or their covariances: blocks on the diagonal plus factors @ factors^T."""

    blocks: Tensor
    """float64 (in_features / span, span, span), symmetric."""
    factors: Tensor
    """float64 (in_features / span, span, rank); the rank may be 0."""

    @classmethod
    def of_uncorrelated(cls, squares: Tensor) -> SecondMoments:
        """Return the moments of channels that do not vary together, from their mean squares, (in_features,)."""
        spans = squares.double().view(-1, math.gcd(len(squares), SPAN))
        return cls(torch.diag_embed(spans), spans.new_zeros(*spans.shape, 0))

    def within_spans(self) -> SecondMoments:
        """Return these moments without what the spans have in common."""
        return SecondMoments(self.blocks + self.factors @ self.factors.mT, self.factors[:, :, :0])

    def rotated(self) -> SecondMoments:
        """Return the moments of inputs that are rotated in runs of 256, as many as a span has here."""
        blocks, factors = _rotate_last(_rotate_last(self.blocks).mT), _rotate_last(self.factors.mT).mT
        return SecondMoments(blocks, factors.contiguous())

    def diagonal(self) -> Tensor:
        """Return the mean square of each input channel: float64, (in_features,)."""
        return (self.blocks.diagonal(dim1=1, dim2=2) + self.factors.square().sum(2)).flatten()


def _rotate_last(values: Tensor) -> Tensor:
    return rotate(values.reshape(-1, values.shape[-1])).view(values.shape)


@dataclass(frozen=True, eq=False)
class Calibration(Importance):
    """An importance matrix with parts of the Gram matrix X^T X of each layer's inputs."""

    products: Mapping[str, Tensor] = field(default_factory=dict)
    """float32, (in_features / span, span, span): sums of x x^T over all tokens; their diagonals are `sums`.

    `span` is the greatest common divisor of `SPAN` and in_features.
    """
    factors: Mapping[str, Tensor] = field(default_factory=dict)
    """float32, (in_features, rank): see `leading_factors`; layers of one span and older files lack them."""
    held_out: Mapping[str, Tensor] = field(default_factory=dict)
    """bfloat16, (tokens, in_features), inputs that are in no sum; there may be 0 tokens. Older files lack them."""

    @property
    def metadata(self) -> dict[str, Any]:
        return {**super().metadata, CALIBRATED: True, CALIBRATION_SHA256: self.sha256}

    @functools.cached_property
    def sha256(self) -> str:
        """The SHA-256 of all that a conversion takes from this calibration, for one layer after the other."""
        digest = hashlib.sha256()
        for name in sorted(self):
            digest.update(f"{name} {float(self.counts[name])}".encode())
            for part in (self.products, self.totals, self.factors, self.held_out):
                values = part.get(name, torch.zeros(0))
                digest.update(str(tuple(values.shape)).encode())
                digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def moments(self, name: str, *, centered: bool = False) -> SecondMoments:
        """Return the second moments of the inputs of a layer, on the CPU.

        Args:
            centered: return the covariances instead; requires that the mean was measured.
        """
        blocks = self.products[name].double() / self.counts[name]
        factors, mean = blocks[:, :, :0], self.mean(name)
        if mean is not None and (centered or name in self.factors):
            if name in self.factors:
                factors = self.factors[name].double().view(*factors.shape[:2], -1) * _KEPT
            column = mean.double().view(*factors.shape[:2], 1)
            blocks = blocks - column @ column.mT - factors @ factors.mT
            # The factors are those of the covariances; the mean is one direction more.
            factors = factors if centered else torch.cat([factors, column], 2)
        return SecondMoments(blocks, factors)


class CalibrationCollector(Collector):
    """A collector of parts of X^T X while a model runs; each evaluation adds at most 1024 tokens per layer."""

    def __init__(self) -> None:
        super().__init__()
        self._held_out: dict[str, HeldOut] = {}

    def add(self, name: str, inputs: Tensor, weight: float = 1.0) -> None:
        """Add tokens at even distances of one call of a layer; the arguments are those of `Collector.add`."""
        tokens = inputs.detach().reshape(-1, inputs.shape[-1])
        step = math.ceil(len(tokens) / _TOKENS)
        # The next evaluation starts at the next token, so that it adds other ones.
        tokens = tokens[self.samples % step :: step]
        held_out = self._held_out.setdefault(name, HeldOut(tokens.shape[1])).choose(tokens)
        added = tokens[held_out.logical_not_()]
        if len(added):
            super().add(name, added, weight)

    def result(self) -> Calibration:
        products, totals, sketches = self.collected()
        sums = {name: values.diagonal(dim1=1, dim2=2).flatten() for name, values in products.items()}
        counts = dict(self._counts)
        wide = [name for name, values in sketches.items() if values.numel()]
        factors = {name: leading_factors(sketches[name], totals[name], counts[name]) for name in wide}
        held_out = {name: kept.tokens for name, kept in self._held_out.items()}
        return Calibration(
            sums, counts, self.samples, totals=totals, products=products, factors=factors, held_out=held_out
        )

    @staticmethod
    def measure(inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the diagonal blocks of X^T X, the sum of each channel, and a sketch of X^T X, all on the CPU.

        Args:
            inputs: floating point, (tokens, in_features).

        Returns:
            float32: (in_features / span, span, span), (in_features,), and (in_features, n), where n is 0 if there is
            one span only.
        """
        blocks = gram_blocks(inputs)
        sketched = sketch(inputs.float()).cpu() if len(blocks) > 1 else torch.zeros(inputs.shape[-1], 0)
        return blocks, inputs.sum(0, dtype=torch.float32).cpu(), sketched


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
