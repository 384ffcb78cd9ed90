"""A type for every tensor such that the file has a given size and the layers' outputs the least error.

Source: the table of errors on sampled rows, its Pareto front and the bisection of the Lagrange multiplier are those of
llama.cpp's pull request 15550. Errors here are those of a layer's outputs, for uncorrelated inputs, relative to these
outputs: most of them are normalized or scaled by what comes next, so that their size says little of what an error does.
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import QuantError
from ..qtype import QTYPES, Effort, QuantType
from ..sources.checkpoint import SourceTensor
from ..units import GIB
from .file_size import header_bytes, padded_bytes
from .recipe import EMBEDDING, EMBEDDING_TYPE, TypePlan, fitting_type, sixteen_bit, treatment

_LADDER = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
# More rows would change the option of few tensors; these take about a minute of one core at 14B.
_SAMPLED_ELEMENTS = 1 << 16

# Source: arXiv 2606.00957 (Wan 2.1 14B: the first two and the last three blocks) and the published NVFP4 mixes of Wan
# (keys and values of cross attention in blocks 0 to 10), both of which measured which layers do most harm.
_FIRST, _LAST = 2, 3
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_EARLY_CROSS = re.compile(r"blocks\.(\d|10)\.cross_attn\.[kv](_img)?\.weight")


class TypeOption(NamedTuple):
    """A type for a tensor: the bytes that it takes in the file, and its `relative_error`."""

    qtype: QuantType
    nbytes: int
    error: float


@dataclass(frozen=True)
class Front:
    """The types worth choosing for one tensor: rising in bytes, falling in error."""

    options: tuple[TypeOption, ...]
    """The Pareto front."""
    corners: tuple[TypeOption, ...]
    """The options on its convex hull, which are the best ones for some price of a byte."""
    raised: bool = False
    """One corner more than the error alone asks for."""

    @classmethod
    def of(cls, options: list[TypeOption], *, raised: bool = False) -> Front:
        front: list[TypeOption] = []
        for option in sorted(options, key=lambda option: (option.nbytes, option.error)):
            if not front or option.error < front[-1].error:
                front.append(option)
        corners = front[:1]
        while corners[-1] is not front[-1]:
            above = front[front.index(corners[-1]) + 1 :]
            corners.append(max(reversed(above), key=lambda option: _price(corners[-1], option)))
        return cls(tuple(front), tuple(corners), raised)

    @property
    def prices(self) -> tuple[float, ...]:
        """What a byte may cost at most, in error, for each corner but the first to be worth it."""
        return tuple(map(_price, self.corners, self.corners[1:]))

    def at(self, price: float) -> TypeOption:
        """The option of the least error plus price times bytes."""
        corner = sum(limit > price for limit in self.prices) + self.raised
        return self.corners[min(corner, len(self.corners) - 1)]


def check_size(
    nbytes: int, tensors: Mapping[str, SourceTensor], metadata: Mapping[str, Any], *, five_d: bool = False
) -> None:
    """Refuses, before anything is measured, a size of file that no option of types comes to.

    Raises:
        QuantError: it is below the smallest or above the largest.
    """
    sizes = [[padded_bytes(q, tensor) for q in allowed_types(name, tensor)] for name, tensor in tensors.items()]
    header = _header_bytes(tensors, metadata, five_d)
    low, high = (header + sum(map(pick, sizes)) for pick in (min, max))
    if not low <= nbytes <= high:
        raise QuantError(
            f"target size {nbytes / GIB:.4g} GiB: cannot be reached with this model;"
            f" choose one from {math.ceil(1000 * low / GIB) / 1000:.3f} to {high / GIB:.3f} GiB"
        )


def plan_for_size(
    nbytes: int,
    tensors: Mapping[str, SourceTensor],
    metadata: Mapping[str, Any],
    fronts: Mapping[str, Front],
    *,
    five_d: bool = False,
) -> TypePlan:
    """The types of a file of at most `nbytes`, headers included, which `check_size` let pass."""
    chosen = allocate(fronts, nbytes - _header_bytes(tensors, metadata, five_d))
    return TypePlan({name: option.qtype for name, option in chosen.items()}, ())


def allocate(fronts: Mapping[str, Front], nbytes: int) -> dict[str, TypeOption]:
    """The options of the least total error in at most `nbytes`, which the smallest options must fit."""
    prices = sorted({0.0, *(price for front in fronts.values() for price in front.prices)})
    # Bytes fall as the price of one rises.
    fitting = bisect.bisect_left(prices, -nbytes, key=lambda price: -_size(fronts, price))
    chosen = {name: front.at(prices[fitting]) for name, front in fronts.items()}
    left = nbytes - sum(option.nbytes for option in chosen.values())
    while steps := [
        (_price(chosen[name], option), name, option)
        for name, front in fronts.items()
        for option in front.options
        if 0 < option.nbytes - chosen[name].nbytes <= left
    ]:
        _, name, option = max(steps, key=lambda step: step[0])
        left -= option.nbytes - chosen[name].nbytes
        chosen[name] = option
    return chosen


def measure(
    tensors: Mapping[str, SourceTensor],
    importance: Mapping[str, Tensor],
    effort: Effort,
    device: torch.device,
    report: Callable[[SourceTensor], None],
) -> dict[str, Front]:
    """The front of every tensor, from rows at even distances; `report` is called before each tensor."""
    n_blocks = 1 + max((int(match[1]) for match in map(_BLOCK.match, tensors) if match), default=0)
    fronts = {}
    for name, tensor in tensors.items():
        report(tensor)
        qtypes = allowed_types(name, tensor)
        if len(qtypes) == 1:
            options = [TypeOption(qtypes[0], padded_bytes(qtypes[0], tensor), 0.0)]
        else:
            weight = _sample(tensor, device)
            options = [
                TypeOption(q, padded_bytes(q, tensor), relative_error(q, weight, importance.get(name), effort))
                for q in qtypes
            ]
        fronts[name] = Front.of(options, raised=_is_raised(name, n_blocks))
    return fronts


def allowed_types(name: str, tensor: SourceTensor) -> list[QuantType]:
    """The types a tensor may get: one if it is never quantized, Q8_0 or 16 bits if it is protected."""
    kind = treatment(name, tensor)
    if kind == "exact":
        return [QTYPES["F32"]]
    ladder = ("Q8_0",) if kind == "protected" else (EMBEDDING_TYPE, "Q8_0") if name == EMBEDDING else _LADDER
    names = (*ladder, sixteen_bit(tensor))
    return list({qtype.name: qtype for qtype in (fitting_type(wanted, tensor) for wanted in names)}.values())


def relative_error(qtype: QuantType, weight: Tensor, importance: Tensor | None, effort: Effort) -> float:
    """Squared, of the outputs of (rows, columns) weights, for inputs of mean square `importance`, (columns,), or 1."""
    power = (torch.ones(()) if importance is None else importance).to(weight.device)
    error = qtype.dequantize(qtype.quantize(weight, importance, effort)).sub_(weight)
    energy = (weight.square() * power).sum().clamp_(min=torch.finfo(torch.float32).tiny)
    return float((error.square_() * power).sum() / energy)


def _sample(tensor: SourceTensor, device: torch.device) -> Tensor:
    """In float32."""
    columns = tensor.shape[-1]
    n_rows = math.prod(tensor.shape[:-1])
    count = min(n_rows, max(1, _SAMPLED_ELEMENTS // columns))
    starts = [(2 * index + 1) * n_rows // (2 * count) * columns for index in range(count)]
    rows = [tensor.read(start, start + columns) for start in starts]
    return torch.stack(rows).to(device).float()


def _is_raised(name: str, n_blocks: int) -> bool:
    match = _BLOCK.match(name)
    if match is None:
        return False
    return not _FIRST <= int(match[1]) < n_blocks - _LAST or _EARLY_CROSS.fullmatch(name) is not None


def _header_bytes(tensors: Mapping[str, SourceTensor], metadata: Mapping[str, Any], five_d: bool) -> int:
    types = {name: allowed_types(name, tensor)[0] for name, tensor in tensors.items()}
    return header_bytes(types, tensors, metadata, five_d=five_d)


def _price(small: TypeOption, large: TypeOption) -> float:
    return (small.error - large.error) / (large.nbytes - small.nbytes)


def _size(fronts: Mapping[str, Front], price: float) -> int:
    return sum(front.at(price).nbytes for front in fronts.values())
