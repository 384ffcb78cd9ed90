"""Calibrated rounding: the products of a Linear's input columns say how later columns make up for earlier errors."""

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
"""Columns whose products are kept: a super-block's. At 14B they take 1.5 GiB, those of all columns 48 GiB."""

# Of an evaluation. 256 columns need a few thousand rows in all, which a few steps of one clip have.
_ROWS = 1 << 10
# Of the mean square of a span's columns: what GPTQ adds to each. Float32 sums are positive definite only with it.
_DAMPING = 0.01


@dataclass(frozen=True, eq=False)
class Calibration(Importance):
    """An importance matrix that also knows the products of neighbouring columns."""

    products: Mapping[str, Tensor] = field(default_factory=dict)
    """Float32 (columns / span, span, span): sums of x x^T over all rows seen, whose diagonals are `sums`."""

    @property
    def metadata(self) -> dict[str, Any]:
        return {**super().metadata, CALIBRATED: True}

    def feedback(self, name: str) -> Tensor:
        """What `Inputs.quantize` needs for a layer: float32 (columns / span, span, span) on the CPU.

        Raises:
            QuantError: no inputs have such products.
        """
        moments = self.products[name].double() / self.counts[name]
        scale = moments.diagonal(dim1=1, dim2=2).mean(1)
        damping = torch.where(scale > 0, _DAMPING * scale, 1.0)
        moments.diagonal(dim1=1, dim2=2).add_(damping[:, None])
        lower, failed = torch.linalg.cholesky_ex(moments)
        if failed.any():
            raise QuantError(f"{self.name}: tensor {name}: is no sum of products of inputs; collect it again")
        factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
        return factor.float()


class CalibrationCollector(Collector):
    """Adds up the products of input columns as a model runs, of at most 1024 rows a layer and evaluation."""

    def add(self, name: str, inputs: Tensor, weight: float = 1.0) -> None:
        """Counts the inputs (..., columns) of a layer, each row `weight` times."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1])
        step = math.ceil(len(rows) / _ROWS)
        # Another evaluation sees other rows.
        super().add(name, rows[self.samples % step :: step], weight)

    def result(self) -> Calibration:
        plain = super().result()
        sums = {name: products.diagonal(dim1=1, dim2=2).flatten() for name, products in plain.sums.items()}
        return Calibration(sums, plain.counts, plain.samples, products=plain.sums)

    @staticmethod
    def measure(inputs: Tensor) -> Tensor:
        return sum_of_products(inputs)


def sum_of_products(inputs: Tensor) -> Tensor:
    """Float32 (columns / span, span, span) of (rows, columns), on the CPU: all layers' would fill an accelerator."""
    span = math.gcd(inputs.shape[-1], SPAN)
    spans = inputs.float().view(len(inputs), -1, span).permute(1, 2, 0)
    return (spans @ spans.mT).cpu()
