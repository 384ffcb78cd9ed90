"""Comparisons that several benchmarks make: gains of files over their peers, and errors of layers' outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from torch import Tensor

from ..quant.statistics.importance import Collector


@dataclass(frozen=True)
class Spread:
    """A mean and a standard deviation in dB; the deviation of a single value, or of infinite ones, is NaN."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        has_deviation = len(values) > 1 and all(map(math.isfinite, values))
        return cls(fmean(values), stdev(values) if has_deviation else math.nan)

    def __str__(self) -> str:
        return f"{self.mean:.1f}" if math.isnan(self.deviation) else f"{self.mean:.1f} ± {self.deviation:.1f}"


@dataclass(frozen=True)
class Gain:
    """The dB by which files are closer than their peers: a mean, and its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Gain:
        spread = Spread.of(values)
        return cls(spread.mean, spread.deviation / len(values) ** 0.5)

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ± {self.error:.2f}"


class Products(Collector):
    """A collector of the means of x x^T over the inputs x of every Linear, each of which ends with a 1 for the bias.

    They are float32, (columns + 1, columns + 1).
    """

    @staticmethod
    def measure(inputs: Tensor) -> tuple[Tensor, ...]:
        rows = torch.nn.functional.pad(inputs.reshape(-1, inputs.shape[-1]), (0, 1), value=1.0)
        return (rows.mT @ rows,)


def output_error(source: Tensor, weight: Tensor, product: Tensor, shift: Tensor | None = None) -> float:
    """Return the squared error of a layer's outputs relative to the outputs without the bias.

    Args:
        source, weight: float32, (rows, columns).
        product: what `Products` collects: float32, (columns + 1, columns + 1).
        shift: the error of the bias, float32 (rows,).
    """
    shift = torch.zeros(len(weight)) if shift is None else shift
    errors = torch.column_stack([weight - source, shift]), torch.nn.functional.pad(source, (0, 1))
    error, output = (float((w @ product * w).sum()) for w in errors)
    return error / output


def decibels(relative_error: float) -> float:
    """Return the SQNR in dB of a squared error relative to the signal."""
    return -10 * math.log10(relative_error)
