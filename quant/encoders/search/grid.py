"""Grids: the fixed lists of entries, levels of four or eight weights at once, that IQ types choose from.

An entry is found by exhaustion. The error of an entry is a sum over its weights, so the errors of all combinations of
levels are tabulated for each half of an entry; each entry then costs one addition. Errors are integers here, so that no
order of additions changes a result, and the number of the entry is in their lowest bits.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...device import cached_on_device
from ...formats.iquants import grid_entries
from .sub_blocks import SubBlocks, reciprocal_or_zero

# Lanes at a time, and sums of errors at a time, which stay in a CPU's cache or bound the memory of an accelerator.
_CPU_LANES, _DEVICE_LANES = 1 << 11, 1 << 18
_CPU_SUMS, _DEVICE_SUMS = 1 << 17, 1 << 27
# The bits of a number: 13 for an entry, 15 for the error of one weight, and three for the sum of eight weights.
_ENTRY_BITS, _ERROR_BITS = 13, 15


class _Tables(NamedTuple):
    """A grid of `rows` entries for `dim` weights."""

    entries: Tensor
    """float32 (dim, rows)."""
    levels: Tensor
    """All levels of entries in rising order, float32 (levels,)."""
    first: Tensor
    """The number of each entry's first half among all combinations of levels, int64 (rows,)."""
    second: Tensor
    """The number of each entry's second half, int64 (rows,)."""
    row: Tensor
    """The row of an entry whose halves have numbers i and j, at i * combinations + j; int64 (combinations ** 2,)."""


class _Scratch(threading.local):
    """Memory of a thread that is written to again and again.

    On a CPU, a search in memory that is new to the process would spend most of its time on page faults.
    """

    kept = torch.empty(0, dtype=torch.int32)

    def take(self, count: int, rows: int, like: Tensor) -> Tensor:
        """Return memory with any contents, int32 (count, rows, lanes), for a tensor of `lanes` columns."""
        n_elements = count * rows * like.shape[1]
        if like.device.type != "cpu":
            return torch.empty(count, rows, like.shape[1], dtype=torch.int32, device=like.device)
        if len(self.kept) < n_elements:
            self.kept = torch.empty(n_elements, dtype=torch.int32)
        return self.kept[:n_elements].view(count, rows, -1)


_scratch = _Scratch()


def levels_of_grid(name: str, device: torch.device) -> Tensor:
    """Return all levels in the entries of a type's grid in rising order, float32 (levels,)."""
    return _tables(name, device).levels


def uniform_levels(name: str, device: torch.device) -> Tensor:
    """Return the levels that all weights of an entry can have alike, float32 (levels,)."""
    entries = _tables(name, device).entries
    return entries[0][entries.amin(0) == entries.amax(0)]


def look_up(name: str, rows: Tensor) -> Tensor:
    """Return the entries in rows of a type's grid: int64 (...) -> float32 (dim, ...)."""
    entries = _tables(name, rows.device).entries
    return torch.stack([levels.index_select(0, rows.flatten()) for levels in entries]).view(-1, *rows.shape)


def closest_rows(name: str, values: Tensor, scale: Tensor, weights: Tensor | None, count: int) -> Tensor:
    """Find the rows of a type's grid whose entries c have least sum weights * (values - scale * c)**2.

    The grid is cut into `count` parts. The best row of each part is found, so the best of all is among them.

    Args:
        values: float32 (dim, lanes).
        scale: float32 (lanes,), at least 0.
        weights: float32 (dim, lanes), or None for 1.
        count: a power of 2.

    Returns:
        int64 (count, lanes).
    """
    tables = _tables(name, values.device)
    step = _CPU_LANES if values.device.type == "cpu" else _DEVICE_LANES
    lanes = SubBlocks(values, weights).split(step)
    parts = zip(lanes, torch.split(scale, step), strict=True)
    return torch.cat([_closest(tables, part.x, scale, part.w, count) for part, scale in parts], 1)


def level_errors(values: Tensor, scale: Tensor, weights: Tensor | None, levels: Tensor) -> Tensor:
    """Return weights * (values - scale * level)**2 for each level, float32 (levels, dim, lanes)."""
    errors = ((scale * levels[:, None])[:, None] - values).square_()
    return errors if weights is None else errors.mul_(weights)


def likely_signs(name: str, x: Tensor, scale: Tensor, w: Tensor | None, count: int, *, even: bool) -> list[Tensor]:
    """Return the signs that the levels of each group may get, up to `count` of float32 (together, lanes).

    They are those of the weights. If the number of minus signs must be even and is not, one sign is wrong, first the
    one that costs least.

    Args:
        x: the weights, float32 (together, lanes).
        scale: float32 (lanes,).
        w: their importance, float32 (together, lanes), or None.
    """
    levels = levels_of_grid(name, x.device)
    if levels[0] < 0:
        return [torch.ones_like(x)]
    signs = torch.where(x < 0, -1.0, 1.0)
    if not even:
        return [signs]
    right, wrong = (level_errors(values, scale, w, levels).amin(0) for values in (x.abs(), -x.abs()))
    cost, numbers = wrong - right, torch.arange(len(x), device=x.device)[:, None]
    is_odd, found = signs.prod(0) < 0, []
    for _ in range(count):
        # On a CPU, `argmin` of several rows is slower.
        is_cheapest = numbers == cost.min(0).indices
        cost = cost.masked_fill(is_cheapest, torch.inf)
        found.append(torch.where(is_cheapest & is_odd, -signs, signs))
    return found


def _closest(tables: _Tables, values: Tensor, scale: Tensor, weights: Tensor | None, count: int) -> Tensor:
    errors = level_errors(values, scale, weights, tables.levels)
    first, second = torch.tensor_split(_to_integers(errors, values, scale, weights, tables.levels), 2, 1)
    combinations = len(tables.levels) ** first.shape[1]
    numbers = torch.arange(combinations, dtype=torch.int32, device=scale.device)[:, None]
    sums = _least_sums(_all_sums(first) + numbers * combinations, _all_sums(second) + numbers, tables, count)
    return tables.row[(sums & ((1 << _ENTRY_BITS) - 1)).long()]


def _least_sums(first: Tensor, second: Tensor, tables: _Tables, count: int) -> Tensor:
    """Return the least error in each part of the grid, int32 (count, lanes).

    Args:
        first, second: the errors of all halves of entries, int32 (combinations, lanes).
    """
    n_rows = len(tables.first)
    step = (_CPU_SUMS if first.device.type == "cpu" else _DEVICE_SUMS) // n_rows
    least = []
    for halves in zip(torch.split(first, step, 1), torch.split(second, step, 1), strict=True):
        sums, other = _scratch.take(2, n_rows, halves[0])
        torch.index_select(halves[0].contiguous(), 0, tables.first, out=sums)
        torch.index_select(halves[1].contiguous(), 0, tables.second, out=other)
        least.append(sums.add_(other).view(-1, count, sums.shape[1]).amin(0))
    return torch.cat(least, 1)


def _to_integers(errors: Tensor, values: Tensor, scale: Tensor, weights: Tensor | None, levels: Tensor) -> Tensor:
    """Round errors to integers, int32 (levels, dim, lanes); the least of each weight is 0.

    The unit is such that errors which matter are far above it. An error that rules an entry out is cut off.
    """
    gap = scale * ((levels[-1] - levels[0]) / (len(levels) - 1))
    beyond = (values.abs() - scale * levels[-1]).clamp_(min=0)
    # What it costs to miss the best level of all weights by one.
    total = SubBlocks(beyond.mul_(2).add_(gap).mul_(gap), weights)
    unit = reciprocal_or_zero(total.weighted_sum(total.x)) * 2.0**_ERROR_BITS
    return ((errors - errors.amin(0)) * unit).clamp_(max=2.0**_ERROR_BITS - 1).int()


def _all_sums(errors: Tensor) -> Tensor:
    """Add up one error of each weight for all combinations of levels, shifted by the bits of the number of an entry.

    Args:
        errors: int32 (levels, weights, lanes).

    Returns:
        int32 (levels ** weights, lanes).
    """
    sums, *rest = (errors << _ENTRY_BITS).unbind(1)
    for of_weight in rest:
        sums = (sums[:, None] + of_weight).flatten(0, 1)
    return sums


@cached_on_device
def _tables(name: str, device: torch.device) -> _Tables:
    entries = grid_entries(name, torch.device("cpu")).numpy()
    levels, digits = np.unique(entries, return_inverse=True)
    first, second = np.split(digits.reshape(entries.shape), 2, axis=1)
    places = len(levels) ** np.arange(first.shape[1])[::-1]
    combinations = len(levels) ** first.shape[1]
    row = np.zeros(combinations**2, np.int64)
    row[(first @ places) * combinations + second @ places] = np.arange(len(entries))
    arrays = (entries.T, levels, first @ places, second @ places, row)
    return _Tables(*(torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in arrays))
