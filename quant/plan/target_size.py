"""Type plans for a file size: the types that minimize the error of the layers' outputs within a number of bytes.

Three steps lead to the plan. `measure` quantizes sampled rows of each tensor with every allowed type. `ParetoFront`
keeps the types that no other type beats in both size and error. `allocate` minimizes the sum of the errors under the
limit on the bytes: it bisects the Lagrange multiplier of the bytes, then spends what is left on single tensors.

An error is that of a layer's outputs for uncorrelated inputs, relative to the outputs. It is relative because most
outputs are normalized or scaled by the next operation, so that their absolute size says little.

Source: llama.cpp's pull request 15550 (errors on sampled rows, Pareto fronts, bisection of the multiplier).
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
from ..sources.tensors import sample_rows
from ..units import GIB
from .file_size import header_bytes, padded_bytes
from .recipe import EMBEDDING, EMBEDDING_TYPE, TypePlan, required_precision, sixteen_bit, type_or_fallback

_QUANTIZED_TYPES = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
# These take several times as long to measure, so only sizes that are below that of Q3_K everywhere use them.
_SMALL_TYPES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
_SMALL = "Q3_K"
# With more elements, few tensors would get another type. A 14B model needs about a minute of one core with these.
_SAMPLED_ELEMENTS = 1 << 16

# Layers whose quantization harms the result more than their own error says. Both sources measured this.
# Source: arXiv 2606.00957 (Wan 2.1 14B: the first two and the last three blocks), and the published NVFP4 mixes of Wan
# (keys and values of cross attention in blocks 0 to 10).
_FIRST_BLOCKS, _LAST_BLOCKS = 2, 3
_BLOCK = re.compile(r"blocks\.(\d{1,9})\.")
_EARLY_CROSS = re.compile(r"blocks\.(\d|10)\.cross_attn\.[kv](_img)?\.weight")


class TypeOption(NamedTuple):
    """A type that a tensor may get, the bytes it needs in the file, and its `relative_error`."""

    qtype: QuantType
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
    is_sensitive: bool = False
    """True if the tensor gets the next larger option of the hull, because its error harms the result more."""

    @classmethod
    def of(cls, options: list[TypeOption], *, is_sensitive: bool = False) -> ParetoFront:
        front: list[TypeOption] = []
        for option in sorted(options, key=lambda option: (option.nbytes, option.error)):
            if not front or option.error < front[-1].error:
                front.append(option)
        hull = front[:1]
        while hull[-1] is not front[-1]:
            larger = front[front.index(hull[-1]) + 1 :]
            hull.append(max(reversed(larger), key=lambda option: _error_per_byte(hull[-1], option)))
        return cls(tuple(front), tuple(hull), tuple(options), is_sensitive)

    def without_small(self) -> ParetoFront:
        """Return the front of the options that are not IQ1, IQ2 or IQ3."""
        options = [option for option in self.measured if option.qtype.name not in _SMALL_TYPES]
        return ParetoFront.of(options, is_sensitive=self.is_sensitive)

    @property
    def multipliers(self) -> tuple[float, ...]:
        """The Lagrange multipliers below which each next option of the hull is the best; they descend."""
        return tuple(map(_error_per_byte, self.hull, self.hull[1:]))

    def best_option(self, multiplier: float) -> TypeOption:
        """Return the option with the least error + multiplier * bytes, or the next larger one if sensitive."""
        index = sum(limit > multiplier for limit in self.multipliers) + self.is_sensitive
        return self.hull[min(index, len(self.hull) - 1)]


def is_small(
    nbytes: int, tensors: Mapping[str, SourceTensor], metadata: Mapping[str, Any], *, five_d: bool = False
) -> bool:
    """Return whether a file of at most `nbytes` needs types below Q3_K: the arguments are those of `check_size`."""
    sizes = (_bytes_at(_SMALL, name, tensor) for name, tensor in tensors.items())
    return nbytes < _header_bytes(tensors, metadata, five_d) + sum(sizes)


def check_size(
    nbytes: int,
    tensors: Mapping[str, SourceTensor],
    metadata: Mapping[str, Any],
    *,
    five_d: bool = False,
    small: bool = True,
) -> None:
    """Refuse a file size that no type plan can reach, before anything is measured.

    Args:
        nbytes: the target size of the file in bytes.
        tensors: the tensors of the source by name.
        metadata: the metadata of the file.
        five_d: whether tensors with five dimensions keep them in the file.
        small: whether IQ1, IQ2 and IQ3 may be used.

    Raises:
        QuantError: smaller than with the smallest types, or larger than with the largest ones.
    """
    sizes = [
        [padded_bytes(q, tensor) for q in allowed_types(name, tensor, small=small)] for name, tensor in tensors.items()
    ]
    header = _header_bytes(tensors, metadata, five_d)
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
    *,
    five_d: bool = False,
) -> TypePlan:
    """Return the types of a file of at most `nbytes`, including its header; `check_size` has accepted the size."""
    chosen = allocate(fronts, nbytes - _header_bytes(tensors, metadata, five_d))
    return TypePlan({name: option.qtype for name, option in chosen.items()}, ())


def allocate(fronts: Mapping[str, ParetoFront], nbytes: int) -> dict[str, TypeOption]:
    """Return one option per tensor so that the sum of the errors is nearly minimal.

    Args:
        fronts: the options by tensor name.
        nbytes: the most bytes that all options may need together, at least those of the smallest options.
    """
    multipliers = sorted({0.0, *(limit for front in fronts.values() for limit in front.multipliers)})
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
        small: whether IQ1, IQ2 and IQ3 are measured too: see `is_small`.
    """
    n_blocks = 1 + max((int(match[1]) for match in map(_BLOCK.match, tensors) if match), default=0)
    fronts = {}
    for name, tensor in tensors.items():
        on_tensor(tensor)
        qtypes = allowed_types(name, tensor, small=small)
        if len(qtypes) == 1:
            options = [TypeOption(qtypes[0], padded_bytes(qtypes[0], tensor), 0.0)]
        else:
            weight = sample_rows(tensor, _SAMPLED_ELEMENTS // tensor.shape[-1]).to(device)
            options = [
                TypeOption(q, padded_bytes(q, tensor), relative_error(q, weight, importance.get(name), effort))
                for q in qtypes
            ]
        fronts[name] = ParetoFront.of(options, is_sensitive=_is_sensitive(name, n_blocks))
    return fronts


def allowed_types(name: str, tensor: SourceTensor, *, small: bool = True) -> list[QuantType]:
    """Return the types that a tensor may get: F32 only, Q8_0 or 16 bits if it is protected, or all types.

    Args:
        small: whether IQ1, IQ2 and IQ3 are among them.
    """
    precision = required_precision(name, tensor)
    if precision == "exact":
        return [QTYPES["F32"]]
    if precision == "protected":
        names: tuple[str, ...] = ("Q8_0",)
    else:
        quantized = (*_SMALL_TYPES, *_QUANTIZED_TYPES) if small else _QUANTIZED_TYPES
        names = (EMBEDDING_TYPE, "Q8_0") if name == EMBEDDING else quantized
    qtypes = (type_or_fallback(wanted, tensor) for wanted in (*names, sixteen_bit(tensor)))
    return list({qtype.name: qtype for qtype in qtypes}.values())


def relative_error(qtype: QuantType, weight: Tensor, importance: Tensor | None, effort: Effort) -> float:
    """Return the squared error of a layer's outputs relative to the squared outputs, for uncorrelated inputs.

    Args:
        qtype: the type that `weight` is quantized to.
        weight: float32, (out_features, in_features).
        importance: floating point, (in_features,), the mean square of each input channel; None is 1 for all.
        effort: the effort of the encoder.
    """
    mean_squares = (torch.ones(()) if importance is None else importance).to(weight.device)
    error = qtype.dequantize(qtype.quantize(weight, importance, effort)).sub_(weight)
    output = (weight.square() * mean_squares).sum().clamp_(min=torch.finfo(torch.float32).tiny)
    if not output.isfinite() and (largest := weight.abs().amax()).isfinite():
        if not error.isfinite().all():
            return math.inf
        error, output = error / largest, ((weight / largest).square() * mean_squares).sum()
    return float((error.square_() * mean_squares).sum() / output)


def _is_sensitive(name: str, n_blocks: int) -> bool:
    match = _BLOCK.match(name)
    if match is None:
        return False
    return not _FIRST_BLOCKS <= int(match[1]) < n_blocks - _LAST_BLOCKS or _EARLY_CROSS.fullmatch(name) is not None


def _bytes_at(qtype: str, name: str, tensor: SourceTensor) -> int:
    """Return the bytes of a tensor if it gets this type wherever it may."""
    qtypes = allowed_types(name, tensor)
    wanted = type_or_fallback(qtype, tensor)
    return padded_bytes(wanted if wanted in qtypes else qtypes[0], tensor)


def _header_bytes(tensors: Mapping[str, SourceTensor], metadata: Mapping[str, Any], five_d: bool) -> int:
    types = {name: allowed_types(name, tensor)[0] for name, tensor in tensors.items()}
    return header_bytes(types, tensors, metadata, five_d=five_d)


def _error_per_byte(small: TypeOption, large: TypeOption) -> float:
    """Return how much error each additional byte removes."""
    return (small.error - large.error) / (large.nbytes - small.nbytes)


def _total_bytes(fronts: Mapping[str, ParetoFront], multiplier: float) -> int:
    return sum(front.best_option(multiplier).nbytes for front in fronts.values())
