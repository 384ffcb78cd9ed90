"""Importance matrices: how large the inputs of every Linear are, column by column, so that errors go where they count.

Source: llama.cpp tools/imatrix/imatrix.cpp @ 050fc7f, whose sums and counts these are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import QuantError
from ..plan.recipe import EMBEDDING, TensorInfo, required_precision

# What the processor's caches hold; elsewhere one kernel reads the input without a copy.
_SLICE_WEIGHTS = 1 << 19


@dataclass(frozen=True, eq=False)
class Importance(Mapping[str, Tensor]):
    """Mean squares of the input columns, float32 (columns,), by the name of the Linear's weight.

    The squared error of a layer's outputs is the sum of the squared errors of its weights times these.
    """

    sums: Mapping[str, Tensor]
    """Float32 (columns,): sums of squares over all rows seen."""
    counts: Mapping[str, float]
    """Rows seen, times their weight."""
    samples: int
    """Evaluations of the model that went in."""
    name: str = "importance"
    """Of the file."""
    datasets: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Tensor:
        return self.sums[name] / self.counts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sums)

    def __len__(self) -> int:
        return len(self.sums)

    @property
    def metadata(self) -> dict[str, Any]:
        """What a file made with it says, under the keys of llama.cpp's tools."""
        return {
            "quantize.imatrix.file": self.name,
            "quantize.imatrix.dataset": ", ".join(self.datasets),
            "quantize.imatrix.entries_count": len(self),
            "quantize.imatrix.chunks_count": self.samples,
        }


class Collector:
    """Adds up squares of inputs as a model runs, on the device where these are."""

    def __init__(self) -> None:
        self.samples = 0
        self.watched: set[str] = set()
        """The layers of the models that ran."""
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, float] = {}

    @property
    def unseen(self) -> list[str]:
        """Those that no inputs reached."""
        return sorted(self.watched - self._counts.keys())

    def add(self, name: str, inputs: Tensor, weight: float = 1.0) -> None:
        """Counts the inputs (..., columns) of a layer, each row `weight` times."""
        sums = self.measure(inputs).mul_(weight)
        known = self._sums.get(name)
        self._sums[name] = sums if known is None else known.add_(sums.to(known.device))
        self._counts[name] = self._counts.get(name, 0.0) + inputs.numel() // inputs.shape[-1] * weight

    def result(self) -> Importance:
        """A copy on the CPU of what was collected so far.

        Raises:
            QuantError: nothing was, or a layer got NaN or infinity.
        """
        if not self._sums:
            raise QuantError("importance: nothing collected yet; sample with the model that Collect gives, then save")
        sums = {name: values.to("cpu", copy=True) for name, values in self._sums.items()}
        broken = next((name for name, values in sums.items() if not values.isfinite().all()), None)
        if broken is not None:
            raise QuantError(f"importance: {broken}: its inputs hold NaN or infinity; collect in another compute dtype")
        return Importance(sums, dict(self._counts), self.samples)

    @staticmethod
    def measure(inputs: Tensor) -> Tensor:
        """What is added up of the inputs, float32."""
        return sum_of_squares(inputs)


def sum_of_squares(inputs: Tensor) -> Tensor:
    """Float32 (columns,) of (..., columns), without a float32 copy of the whole."""
    rows = inputs.detach().reshape(-1, inputs.shape[-1])
    if rows.device.type != "cpu":
        norms: Tensor = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float32)
        return norms.square_()
    total = torch.zeros(rows.shape[-1])
    for part in torch.split(rows, max(1, _SLICE_WEIGHTS // rows.shape[-1])):
        total += part.to(torch.float32, copy=True).square_().sum(0)
    return total


def check_importance(importance: Mapping[str, Tensor] | None, tensors: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """Checks that an importance matrix, if there is one, is of this model.

    Returns:
        A warning where it lacks matrices that will be quantized, whose inputs count as 1.

    Raises:
        QuantError: the first tensor that the model lacks or has in another width, or values that are no mean squares.
    """
    if not importance:
        return ()
    label = importance.name if isinstance(importance, Importance) else "importance"
    for name, values in importance.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise QuantError(f"{label}: tensor {name}: not in this model; take the importance matrix of this model")
        if tuple(values.shape) != tensor.shape[-1:]:
            raise QuantError(
                f"{label}: tensor {name}: {tuple(values.shape)} columns, but {tensor.shape[-1:]} in this model;"
                " take the importance matrix of this model"
            )
        if not (values.isfinite().all() and (values >= 0).all()):
            raise QuantError(f"{label}: tensor {name}: holds NaN, infinity or a negative value; collect it again")
    wanted = (
        name
        for name, tensor in tensors.items()
        if required_precision(name, tensor) == "quantized" and name != EMBEDDING
    )
    missing = [name for name in wanted if name not in importance]
    return (f"the importance matrix lacks {len(missing)} matrices, the first is {missing[0]}",) if missing else ()
