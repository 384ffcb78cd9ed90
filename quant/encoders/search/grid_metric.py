"""Rounding to the entries of a grid where the errors of a group's weights are coupled, as error feedback needs it.

The error of levels c is ||e P||**2 with e = x - scale * c and an upper triangular P. Candidates come from the diagonal
of H = P P^T, which ignores the coupling. Each of them is then tried with one or two of its signs changed. A change d_i
of e_i changes the error by d_i * (2 * (e H)_i + d_i * H_ii), and two changes add 2 * d_i * d_j * H_ij.

All sums run in a fixed order over whole lanes, so that no other lane and no thread changes a result.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ...formats.iquants import GRID_WEIGHTS
from .grid import closest_rows, levels_of_grid, look_up
from .sub_blocks import pairwise_sum

# Parts of a grid, each of which gives a candidate; entries without signs of their own have no other alternatives.
_PARTS, _SIGNED_PARTS = 8, 16


def nearest_coupled(
    name: str, values: Tensor, scale: Tensor, factor: Tensor, offset: float | Tensor, *, even_signs: bool
) -> tuple[Tensor, Tensor]:
    """Round groups to levels of little error.

    Args:
        name: the type.
        values: float32 (together, n * rows).
        scale: float32 (n * rows,), at least 0.
        factor: P, float32 (n, together, together), of `rows` neighboring lanes each.
        offset: is added to all levels.
        even_signs: whether the number of minus signs of a group is even.

    Returns:
        The levels, float32 (together, n * rows), and their errors, float32 (n * rows,).
    """
    if len(values) == GRID_WEIGHTS[name]:
        return _nearest(name, values, scale, factor, offset, 1 if even_signs else 0)
    options = [_nearest_pair(name, values, scale, factor, parity) for parity in ((1, -1) if even_signs else (0,))]
    levels, errors = options[0]
    for other_levels, other_errors in options[1:]:
        is_better = other_errors < errors
        levels, errors = torch.where(is_better, other_levels, levels), torch.where(is_better, other_errors, errors)
    return levels, errors


def _nearest_pair(name: str, values: Tensor, scale: Tensor, factor: Tensor, parity: int) -> tuple[Tensor, Tensor]:
    """Round groups of two entries, whose numbers of minus signs have one parity: first one entry, then the other.

    The second makes up for the errors of the first.
    """
    half = len(values) // 2
    levels, errors = _nearest(name, values[:half], scale, factor[:, :half, :half], 0.0, parity)
    residual = values[:half] - scale * levels
    passed_on = _times(residual, _divided(factor[:, :half, half:], factor[:, half:, half:]))
    more, more_errors = _nearest(name, values[half:] + passed_on, scale, factor[:, half:, half:], 0.0, parity)
    return torch.cat((levels, more)), errors + more_errors


def _nearest(
    name: str, values: Tensor, scale: Tensor, factor: Tensor, offset: float | Tensor, parity: int
) -> tuple[Tensor, Tensor]:
    """Round groups of one entry.

    Args:
        parity: the product of all signs, or 0 if it is free.
    """
    dim, is_signed = len(values), bool(levels_of_grid(name, values.device)[0] < 0)
    products = _products(factor)
    signs = torch.ones_like(values) if is_signed else torch.where(values < 0, -1.0, 1.0)
    count = _SIGNED_PARTS if is_signed else _PARTS
    shape = (dim, 1, len(factor), -1)
    weights = torch.stack([products[:, i, i] for i in range(dim)])[:, None, :, None].expand_as(values.view(shape))
    found = closest_rows(name, (values - scale * offset) * signs, scale, weights.reshape(dim, -1), count)
    levels = look_up(name, found) * signs[:, None] + offset
    flips: list[tuple[int, ...]] = [()] if is_signed else list(_flips(dim))
    errors, chosen = _try_flips(
        values.view(shape), (levels * scale).view(dim, count, *shape[2:]), products, flips, parity
    )
    errors, chosen = errors.view(count, -1), chosen.view(count, -1)
    best = errors.argmin(0, keepdim=True)
    table = torch.tensor([[-1.0 if i in flip else 1.0 for flip in flips] for i in range(dim)], device=values.device)
    levels = torch.stack([each.gather(0, best)[0] for each in levels])
    return levels * table.index_select(1, chosen.gather(0, best)[0]), errors.gather(0, best)[0]


def _try_flips(
    x: Tensor, restored: Tensor, products: Tensor, flips: list[tuple[int, ...]], parity: int
) -> tuple[Tensor, Tensor]:
    """Return the least error of each candidate, and the number of the flips that give it.

    Args:
        x: float32 (dim, 1, n, rows).
        restored: scale * level of each candidate, float32 (dim, candidates, n, rows).
        products: H, float32 (n, dim, dim).
        flips: the weights whose signs change.
        parity: as in `_nearest`.

    Returns:
        float32 and int64, (candidates, n, rows).
    """
    errors, changes = x - restored, restored * 2
    coupled = [_sum([error * _column(products, i, j) for j, error in enumerate(errors)]) for i in range(len(x))]
    total = _sum([error * each for error, each in zip(errors, coupled, strict=True)])
    alone = [d * (2 * e + d * _column(products, i, i)) for i, (d, e) in enumerate(zip(changes, coupled, strict=True))]
    product = torch.where(restored < 0, -1.0, 1.0).prod(0)
    least, chosen = torch.full_like(total, torch.inf), torch.zeros_like(total, dtype=torch.int64)
    for number, flip in enumerate(flips):
        error = _sum([total, *(alone[i] for i in flip)])
        for i, j in itertools.combinations(flip, 2):
            error = error + changes[i] * changes[j] * (2 * _column(products, i, j))
        is_better = error < least
        if parity:
            is_better &= product == parity * (-1) ** len(flip)
        least, chosen = torch.where(is_better, error, least), chosen.masked_fill(is_better, number)
    return least, chosen


def _flips(dim: int) -> Iterator[tuple[int, ...]]:
    """Yield the empty set of `dim` numbers, and all sets of one or two."""
    for size in range(3):
        yield from itertools.combinations(range(dim), size)


def _column(products: Tensor, i: int, j: int) -> Tensor:
    """Return one element of each matrix, (n, dim, dim) -> (n, 1)."""
    return products[:, i, j, None]


def _products(factor: Tensor) -> Tensor:
    """Return H = P P^T of matrices P, float32 (n, dim, dim)."""
    return pairwise_sum((factor[:, :, None] * factor[:, None]).movedim(-1, 0))


def _times(values: Tensor, matrices: Tensor) -> Tensor:
    """Multiply row vectors with matrices: (k, n * rows) and (n, k, m) -> (m, n * rows)."""
    vectors = values.view(len(values), len(matrices), -1)
    columns = (_sum([v * _column(matrices, i, j) for i, v in enumerate(vectors)]) for j in range(matrices.shape[2]))
    return torch.stack([column.flatten() for column in columns])


def _divided(values: Tensor, triangular: Tensor) -> Tensor:
    """Return values @ inverse(triangular) for upper triangular matrices; all are (n, k, k)."""
    columns: list[Tensor] = []
    for j in range(values.shape[2]):
        known = [column * triangular[:, i, j, None] for i, column in enumerate(columns)]
        columns.append(
            (values[:, :, j] - _sum([torch.zeros_like(values[:, :, j]), *known])) / triangular[:, j, j, None]
        )
    return torch.stack(columns, 2)


def _sum(values: list[Tensor]) -> Tensor:
    """Add tensors of one shape in order."""
    total, *rest = values
    for value in rest:
        total = total + value
    return total
