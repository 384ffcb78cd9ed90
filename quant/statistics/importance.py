"""Importance matrices (imatrix in llama.cpp): the mean square of every input channel of every Linear.

A Linear computes y = W x, so an error in one column of W is multiplied by the input channel of that column. For
uncorrelated input channels, the expected squared error of the outputs is a weighted sum of the squared errors in W.
The weight of each squared error is the mean square of its input channel. A conversion with an importance matrix
minimizes that sum instead of the plain squared error: it moves the error to the channels whose inputs are small.

The mean of each input channel is kept as well. It says by how much the error of a weight shifts the outputs on average,
for which the bias of the layer can make up.

`Collector` adds up the squares while a model samples; `importance_file` reads and writes the result.

Source: llama.cpp tools/imatrix/imatrix.cpp @ 050fc7f, which stores the same sums of squares and counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import QuantError
from ..plan.recipe import EMBEDDING, TensorInfo, required_precision
from ..units import counted

# A slice of this many elements stays in the caches of a CPU. On an accelerator one kernel reads the whole input.
_SLICE_ELEMENTS = 1 << 19


@dataclass(frozen=True, eq=False)
class Importance(Mapping[str, Tensor]):
    """An importance matrix: by the name of a Linear's weight, the mean square of each input channel.

    Each value is float32, (in_features,).
    """

    sums: Mapping[str, Tensor]
    """float32, (in_features,): the sum of squares of each input channel over all tokens."""
    counts: Mapping[str, float]
    """The number of tokens (rows of the layer's input), each counted by its weight."""
    samples: int
    """The number of evaluations of the model."""
    name: str = "importance"
    """The name of the file, for messages and for the metadata of files that are made with it."""
    datasets: tuple[str, ...] = ()
    """The names of the data that the model was run on."""
    totals: Mapping[str, Tensor] = field(default_factory=dict)
    """float32, (in_features,): the sum of each input channel over all tokens; files of other programs lack it."""

    def mean(self, name: str) -> Tensor | None:
        """Return the mean of each input channel, float32 (in_features,), or None where it was not measured."""
        return self.totals[name] / self.counts[name] if name in self.totals else None

    def __getitem__(self, name: str) -> Tensor:
        return self.sums[name] / self.counts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sums)

    def __len__(self) -> int:
        return len(self.sums)

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata of a GGUF that is made with this matrix, under the keys of llama.cpp's tools."""
        return {
            "quantize.imatrix.file": self.name,
            "quantize.imatrix.dataset": ", ".join(self.datasets),
            "quantize.imatrix.entries_count": len(self),
            "quantize.imatrix.chunks_count": self.samples,
        }


class Collector:
    """A collector of the sums and squares of the layers' inputs while a model runs.

    They are added up on the inputs' device.
    """

    def __init__(self) -> None:
        self.samples = 0
        self.watched: set[str] = set()
        """The names of the weights of all layers whose inputs are to be collected."""
        self._sums: dict[str, tuple[Tensor, ...]] = {}
        self._counts: dict[str, float] = {}

    @property
    def unseen(self) -> list[str]:
        """The watched layers that have not run yet, sorted by name."""
        return sorted(self.watched - self._counts.keys())

    def add(self, name: str, inputs: Tensor, weight: float = 1.0) -> None:
        """Add the inputs of one call of a layer.

        Args:
            name: the name of the layer's weight.
            inputs: floating point, (..., in_features).
            weight: how often each row of `inputs` counts.
        """
        sums = tuple(values.mul_(weight) for values in self.measure(inputs))
        known = self._sums.get(name)
        if known is not None:
            sums = tuple(one.add_(other.to(one.device)) for one, other in zip(known, sums, strict=True))
        self._sums[name] = sums
        self._counts[name] = self._counts.get(name, 0.0) + inputs.numel() // inputs.shape[-1] * weight

    def result(self) -> Importance:
        """Return what was collected so far, as a copy on the CPU.

        Raises:
            QuantError: nothing was collected, or the inputs of a layer hold NaN or infinity.
        """
        squares, *totals = self.collected()
        return Importance(squares, dict(self._counts), self.samples, totals=totals[0] if totals else {})

    def collected(self) -> list[dict[str, Tensor]]:
        """Return a copy of each statistic that `measure` returns, by the name of the weight.

        Each is float32, of the shape that `measure` gives it, on the CPU. It raises what `result` raises.
        """
        if not self._sums:
            raise QuantError(
                "importance: nothing collected yet, expected the inputs of at least one layer; sample with the model"
                " output of Collect Importance Matrix before saving"
            )
        sums = {name: [values.to("cpu", copy=True) for values in parts] for name, parts in self._sums.items()}
        broken = next((n for n, parts in sums.items() if not all(values.isfinite().all() for values in parts)), None)
        if broken is not None:
            raise QuantError(
                f"importance: tensor {broken}: its inputs hold NaN or infinity, expected finite numbers;"
                " collect again with another compute dtype"
            )
        n_statistics = len(next(iter(sums.values())))
        return [{name: parts[i] for name, parts in sums.items()} for i in range(n_statistics)]

    @staticmethod
    def measure(inputs: Tensor) -> tuple[Tensor, ...]:
        """Return what is added up, from inputs of shape (..., in_features).

        Returns:
            The sum of squares and the sum of each input channel, float32 (in_features,) each.
        """
        return sum_up(inputs)


def sum_up(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of squares and the sum of each input channel, without a float32 copy of the whole input.

    Args:
        inputs: floating point, (..., in_features).

    Returns:
        float32, (in_features,) each, on the same device.
    """
    rows = inputs.detach().reshape(-1, inputs.shape[-1])
    if rows.device.type != "cpu":
        norms: Tensor = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float32)
        return norms.square_(), rows.sum(0, dtype=torch.float32)
    squares, total = torch.zeros(2, rows.shape[-1])
    for part in torch.split(rows, max(1, _SLICE_ELEMENTS // rows.shape[-1])):
        values = part.to(torch.float32, copy=True)
        total += values.sum(0)
        squares += values.square_().sum(0)
    return squares, total


def check_importance(importance: Mapping[str, Tensor] | None, tensors: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """Check that an importance matrix belongs to this model.

    Args:
        importance: floating point, (in_features,), by tensor name; None or empty passes.
        tensors: the tensors of the model by name.

    Returns:
        One warning if matrices that will be quantized are missing, else none. The mean square of their inputs counts
        as 1.

    Raises:
        QuantError: the model lacks a tensor or has another number of input channels there, or values are not mean
            squares.
    """
    if not importance:
        return ()
    label = importance.name if isinstance(importance, Importance) else "importance"
    for name, values in importance.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise QuantError(
                f"{label}: tensor {name}: not in this model; choose a file that was collected from this model"
            )
        if tuple(values.shape) != tensor.shape[-1:]:
            raise QuantError(
                f"{label}: tensor {name}: has shape {tuple(values.shape)}, expected {tensor.shape[-1:]} for the input"
                " channels in this model; choose a file that was collected from this model"
            )
        if not (values.isfinite().all() and (values >= 0).all()):
            raise QuantError(
                f"{label}: tensor {name}: holds NaN, infinity or a negative value, expected mean squares;"
                " collect them again"
            )
    quantized = (name for name, tensor in tensors.items() if required_precision(name, tensor) == "quantized")
    missing = [name for name in quantized if name not in importance and name != EMBEDDING]
    what = counted(len(missing), "matrix", "matrices")
    return (f"the importance matrix lacks {what}, the first is {missing[0]}",) if missing else ()
