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

from ...device import cached_on_device
from ...formats.iquants import GRID_WEIGHTS
from .grid import closest_rows, levels_of_grid, look_up
from .sub_blocks import pairwise_sum

# Parts of a grid, each of which gives a candidate; entries without signs of their own have no other alternatives.
_PARTS, _SIGNED_PARTS = 8, 16
# The most signs that change at once.
_FLIPS = 2
# Groups to round at a time on a CPU, which then finds their candidates in its caches.
_CPU_LANES = 1 << 12


def nearest_coupled(
    name: str, values: Tensor, scale: Tensor, factor: Tensor, offset: float | Tensor, *, even_signs: bool
) -> tuple[Tensor, Tensor]:
    """Round groups to levels of little error.

    Args:
        name: the type.
        values: float32 (together, n * rows).
        scale: float32 (n * rows,), at least 0.
        factor: P, float32 (n, together, together), of `rows` neighboring lanes each.
        offset: is added to all levels; a number, or float32 (n * rows,).
        even_signs: whether the number of minus signs of a group is even.

    Returns:
        The levels, float32 (together, n * rows), and their errors, float32 (n * rows,).
    """
    n, lanes = len(factor), len(scale)
    step = max(1, _CPU_LANES // n) if values.device.type == "cpu" else max(1, lanes // n)
    offsets = offset if isinstance(offset, Tensor) else scale.new_tensor(offset).expand(lanes)
    parts = zip(*(torch.split(each.view(-1, n, lanes // n), step, 2) for each in (values, scale, offsets)), strict=True)
    found = [
        _nearest_some(name, x.flatten(1), scale.flatten(), factor, offset.flatten(), even_signs=even_signs)
        for x, scale, offset in parts
    ]
    levels, errors = (
        torch.cat([each.unflatten(-1, (n, -1)) for each in some], -1) for some in zip(*found, strict=True)
    )
    return levels.flatten(1), errors.flatten()


def _nearest_some(
    name: str, values: Tensor, scale: Tensor, factor: Tensor, offset: Tensor, *, even_signs: bool
) -> tuple[Tensor, Tensor]:
    """Round as many groups as fit into a CPU's cache; the arguments are those of `nearest_coupled`."""
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
    products = _products(factor).permute(1, 2, 0)[..., None].expand(-1, -1, -1, len(scale) // len(factor)).flatten(2)
    signs = torch.ones_like(values) if is_signed else torch.where(values < 0, -1.0, 1.0)
    weights = products.diagonal().t().contiguous()
    count = _SIGNED_PARTS if is_signed else _PARTS
    found = closest_rows(name, (values - scale * offset) * signs, scale, weights, count)
    levels = look_up(name, found) * signs[:, None] + offset
    restored, flips = levels * scale, 0 if is_signed else _FLIPS
    # The signs of all candidates are alike.
    has_parity = torch.where(restored[:, 0] < 0, -1.0, 1.0).prod(0) == parity if parity else None
    best = _least_error(values, restored, products, flips, has_parity).min(0, keepdim=True).indices
    levels = levels.gather(1, best.expand(dim, 1, -1))
    errors = torch.cat(list(_flipped(values, levels * scale, products, flips)))[:, 0]
    changed, sizes = _flip_tables(dim, flips, values.device)
    if has_parity is not None:
        errors.masked_fill_((sizes % 2 == 0)[:, None] != has_parity, torch.inf)
    least, chosen = errors.min(0)
    return levels[:, 0] * changed.index_select(1, chosen), least


def _least_error(x: Tensor, restored: Tensor, products: Tensor, flips: int, has_parity: Tensor | None) -> Tensor:
    """Return the least error of each candidate with up to `flips` signs changed, float32 (candidates, lanes).

    Args:
        x: float32 (dim, lanes).
        restored: scale * level of each candidate, float32 (dim, candidates, lanes).
        products: H of each lane, float32 (dim, dim, lanes).
        has_parity: whether an even number of signs must change, and not an odd one, bool (lanes,); None if both may.
    """
    even, *changed = (errors.amin(0) for errors in _flipped(x, restored, products, flips))
    if not changed:
        return even
    odd, *twice = changed
    for errors in twice:
        torch.minimum(even, errors, out=even)
    return torch.minimum(even, odd) if has_parity is None else torch.where(has_parity, even, odd)


def _flipped(x: Tensor, restored: Tensor, products: Tensor, flips: int) -> Iterator[Tensor]:
    """Yield the errors of candidates under each set of `_flip_tables`, float32 (some sets, candidates, lanes).

    The arguments are those of `_least_error`.
    """
    errors, changes, twice = x[:, None] - restored, restored * 2, products * 2
    coupled = errors[0] * products[:, 0, None]
    for j in range(1, len(x)):
        coupled += errors[j] * products[:, j, None]
    total = _sum(list(errors.mul_(coupled)))
    yield total[None]
    if not flips:
        return
    # In place, since reading and writing memory takes most of the time.
    alone = (changes * products.diagonal().t()[:, None]).add_(coupled.mul_(2)).mul_(changes)
    yield total + alone
    for i in range(len(x) - 1):
        both = (changes[i + 1 :] * changes[i]).mul_(twice[i, i + 1 :, None])
        yield both.add_(alone[i + 1 :] + (total + alone[i]))


@cached_on_device
def _flip_tables(dim: int, most: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the factors of `dim` signs under each of the sets that `_flipped` goes through, and the sizes of these.

    The sets are those of up to `most` numbers, the smaller ones first: float32 (dim, sets) and int64 (sets,).
    """
    sets = [flip for size in range(most + 1) for flip in itertools.combinations(range(dim), size)]
    factors = torch.tensor([[-1.0 if i in flip else 1.0 for flip in sets] for i in range(dim)], device=device)
    return factors, torch.tensor([len(flip) for flip in sets], device=device)


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
