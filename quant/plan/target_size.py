"""Type plans for a file size: the types that minimize the error of the layers' outputs within a number of bytes.

Three steps lead to the plan. `measure` quantizes sampled rows of each tensor with every allowed type. `ParetoFront`
keeps the types that no other type beats in both size and error. `allocate` minimizes the sum of the errors under the
limit on the bytes: it bisects the Lagrange multiplier of the bytes, then spends what is left on single tensors.

An error is that of a layer's outputs, relative to the outputs: see `layer_error`. It is relative because most outputs
are normalized or scaled by the next operation, so that their absolute size says little.

Source: llama.cpp's pull request 15550 (errors on sampled rows, Pareto fronts, bisection of the multiplier).
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import QuantError
from ..qtype import Effort
from ..sources.checkpoint import SourceTensor
from ..sources.tensors import sample_rows
from ..units import GIB
from .container import SMALL_TYPES, Container, GGUFContainer
from .layer_error import input_error, relative_error, sampled_type
from .recipe import StoredType, TypePlan

# With more elements, few tensors would get another type. A 14B model needs about a minute of one core with these.
_SAMPLED_ELEMENTS = 1 << 16

# Layers whose quantization harms the result more than their own error says. Both sources measured this. How much, they
# do not say: four times is the error that one bit more removes.
# Source: arXiv 2606.00957 (Wan 2.1 14B: the first two and the last three blocks), and the published NVFP4 mixes of Wan
# (keys and values of cross attention in blocks 0 to 10).
_SENSITIVE = 4.0
_FIRST_BLOCKS, _LAST_BLOCKS = 2, 3
_BLOCK = re.compile(r"blocks\.(\d{1,9})\.")
_EARLY_CROSS = re.compile(r"blocks\.(\d|10)\.cross_attn\.[kv](_img)?\.weight")


class TypeOption(NamedTuple):
    """A type that a tensor may get, the bytes it needs in the file, and its error as far as it harms the result."""

    qtype: StoredType
    nbytes: int
    error: float


@dataclass(frozen=True)
class ParetoFront:
    """The options for one tensor that no other option beats in both bytes and error."""

    options: tuple[TypeOption, ...]
    """All of them, with ascending bytes and descending error."""
    hull: tuple[TypeOption, ...]
    """Those on the convex hull: each minimizes error + multiplier * bytes for some multiplier."""
    measured: tuple[TypeOption, ...] = ()
    """All options that were measured, also those that are not on the front."""

    @classmethod
    def of(cls, options: Sequence[TypeOption]) -> ParetoFront:
        front: list[TypeOption] = []
        for option in sorted(options, key=lambda option: (option.nbytes, option.error)):
            if not front or option.error < front[-1].error:
                front.append(option)
        hull = front[:1]
        while hull[-1] is not front[-1]:
            larger = front[front.index(hull[-1]) + 1 :]
            hull.append(max(reversed(larger), key=lambda option: _error_per_byte(hull[-1], option)))
        return cls(tuple(front), tuple(hull), tuple(options))

    def without_small(self) -> ParetoFront:
        """Return the front of the options that are not IQ1, IQ2 or IQ3."""
        return ParetoFront.of([option for option in self.measured if option.qtype.name not in SMALL_TYPES])

    @property
    def multipliers(self) -> tuple[float, ...]:
        """The Lagrange multipliers below which each next option of the hull is the best; they descend."""
        return tuple(map(_error_per_byte, self.hull, self.hull[1:]))

    def best_option(self, multiplier: float) -> TypeOption:
        """Return the option with the least error + multiplier * bytes."""
        return self.hull[sum(limit > multiplier for limit in self.multipliers)]


def check_size(
    nbytes: int,
    tensors: Mapping[str, SourceTensor],
    metadata: Mapping[str, Any],
    container: Container,
    *,
    small: bool = True,
) -> None:
    """Refuse a file size that no type plan can reach, before anything is measured.

    Args:
        nbytes: the target size of the file in bytes.
        tensors: the tensors of the source by name.
        metadata: the metadata of the file.
        container: the kind of the file.
        small: whether IQ1, IQ2 and IQ3 may be used.

    Raises:
        QuantError: smaller than with the smallest types, or larger than with the largest ones.
    """
    sizes = [
        [container.nbytes(name, q, tensor) for q in container.types(name, tensor, small=small)]
        for name, tensor in tensors.items()
    ]
    header = container.header_bytes(tensors, metadata)
    low, high = (header + sum(map(pick, sizes)) for pick in (min, max))
    if not low <= nbytes <= high:
        raise QuantError(
            f"target size {nbytes / GIB:.4g} GiB: cannot be reached with this model;"
            f" choose a size from {math.ceil(1000 * low / GIB) / 1000:.3f} to {high / GIB:.3f} GiB"
        )


def plan_for_size(
    nbytes: int,
    tensors: Mapping[str, SourceTensor],
    metadata: Mapping[str, Any],
    fronts: Mapping[str, ParetoFront],
    container: Container,
) -> TypePlan:
    """Return the types of a file of at most `nbytes`, including its header; `check_size` has accepted the size."""
    chosen = allocate(fronts, nbytes - container.header_bytes(tensors, metadata))
    return TypePlan({name: option.qtype for name, option in chosen.items()}, ())


def allocate(fronts: Mapping[str, ParetoFront], nbytes: int) -> dict[str, TypeOption]:
    """Return one option per tensor so that the sum of the errors is nearly minimal.

    Args:
        fronts: the options by tensor name.
        nbytes: the most bytes that all options may need together, at least those of the smallest options.
    """
    multipliers = sorted({0.0, math.inf, *(limit for front in fronts.values() for limit in front.multipliers)})
    # A larger multiplier gives fewer bytes, so the negative bytes are sorted.
    index = bisect.bisect_left(multipliers, -nbytes, key=lambda multiplier: -_total_bytes(fronts, multiplier))
    chosen = {name: front.best_option(multipliers[index]) for name, front in fronts.items()}
    left = nbytes - sum(option.nbytes for option in chosen.values())
    while steps := [
        (_error_per_byte(chosen[name], option), name, option)
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
    on_tensor: Callable[[SourceTensor], None],
    container: Container | None = None,
    *,
    small: bool = False,
) -> dict[str, ParetoFront]:
    """Return the Pareto front of every tensor, measured on rows at even distances.

    Args:
        tensors: the tensors of the source by name.
        importance: floating point, (in_features,), by tensor name; 1 where a name is missing.
        effort: the effort of the conversion.
        device: the device that quantizes.
        on_tensor: is called before each tensor is measured.
        container: the kind of the file; a GGUF if None.
        small: whether IQ1, IQ2 and IQ3 are measured too: see `Container.is_small`.
    """
    container = container or GGUFContainer()
    n_blocks = 1 + max((int(match[1]) for match in map(_BLOCK.match, tensors) if match), default=0)
    fronts = {}
    for name, tensor in tensors.items():
        on_tensor(tensor)
        qtypes = container.types(name, tensor, small=small)
        if len(qtypes) == 1:
            options = [TypeOption(qtypes[0], container.nbytes(name, qtypes[0], tensor), 0.0)]
        else:
            weight = sample_rows(tensor, _SAMPLED_ELEMENTS // tensor.shape[-1]).to(device)
            counts = _SENSITIVE if _is_sensitive(name, n_blocks) else 1
            options = [
                TypeOption(
                    q, container.nbytes(name, q, tensor), counts * _error(q, weight, importance.get(name), effort)
                )
                for q in qtypes
            ]
        fronts[name] = ParetoFront.of(options)
    return fronts


def _error(qtype: StoredType, weight: Tensor, importance: Tensor | None, effort: Effort) -> float:
    of_weight = relative_error(sampled_type(qtype, weight), weight, importance, effort)
    return of_weight + input_error(qtype, weight, importance)


def _is_sensitive(name: str, n_blocks: int) -> bool:
    match = _BLOCK.match(name)
    if match is None:
        return False
    return not _FIRST_BLOCKS <= int(match[1]) < n_blocks - _LAST_BLOCKS or _EARLY_CROSS.fullmatch(name) is not None


def _error_per_byte(small: TypeOption, large: TypeOption) -> float:
    """Return how much error each additional byte removes."""
    return (small.error - large.error) / (large.nbytes - small.nbytes)


def _total_bytes(fronts: Mapping[str, ParetoFront], multiplier: float) -> int:
    return sum(front.best_option(multiplier).nbytes for front in fronts.values())
