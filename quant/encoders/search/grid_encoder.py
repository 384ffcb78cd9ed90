"""The encoders of IQ types, whose weights are rounded to the entries of a grid, four or eight at once.

The terms are those of this folder, and:

- A group is the weights that are rounded at once. One entry of the grid holds its levels, or two entries do.
- Where a type stores seven signs for eight weights, the number of minus signs must be even.
- The integer scales are odd, x ~ d * scale * level, and `d` is the stored float16 times the type's fixed unit.
- IQ1 adds an offset of 1/8 or -1/8 to all levels of a group (IQ1_M) or of a sub-block (IQ1_S).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...formats.iquants import GRID_WEIGHTS, UNITS
from .constants import encode_constants_once
from .fit import BlockScales
from .grid import closest_rows, likely_signs, look_up, uniform_levels
from .grid_candidates import (
    HARD,
    Candidates,
    GridSearch,
    TriedScales,
    best_of,
    fit_constants,
    weighted_error,
    weighted_sums,
)
from .grid_metric import nearest_coupled
from .levels import ScaledLevels
from .sub_blocks import SubBlocks, pairwise_sum, reciprocal_or_zero, round_to_float16, select_best

Pack = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Writes blocks from d as stored, float32 (n,), scales, (n, k), and levels, (n, 256): returns uint8 (n, type_size)."""

# Parts of a grid, each of which gives a candidate.
_PARTS = 4
# Signs that may be wrong, where the number of minus signs must be even and is not.
_FLIPS = 2
# How many neighbors away an integer scale may lie from the usual one.
_NEAR = (0, -1, 1, -2, 2)
# Blocks to search for the scales of at a time. On a CPU, their candidates then stay in its cache.
_CPU_BLOCKS = 256
# Blocks whose weights all have nearly one magnitude need other scales than the usual: the square of their mean has at
# least this share of their mean square. It is 0.64 for Gaussian weights.
_EVEN_SHARE = 0.85
# Below this, a float16 has fewer digits than usual.
_SUBNORMAL = 2.0**-14


@dataclass(frozen=True)
class GridEncoder(ScaledLevels):
    """An encoder that first searches for the scales of blocks and then rounds the weights to entries of a grid.

    Args:
        name: the type.
        size: the number of weights in a sub-block.
        together: the number of weights in a group.
        search: the integers of the type.
        pack: writes the blocks.
        even_signs: whether the number of minus signs of a group is even.
        offsets: each sub-block adds one of these to all of its levels.
        group_offsets: each group adds one of these to all of its levels.
    """

    name: str
    size: int
    together: int
    search: GridSearch
    pack: Pack
    even_signs: bool = False
    offsets: tuple[float, ...] = (0.0,)
    group_offsets: tuple[float, ...] = (0.0,)

    def __call__(self, blocks: Tensor, importance: Tensor | None = None) -> Tensor:
        """Encode blocks, float32 (n, 256), with importance of the same shape, to uint8 (n, type_size)."""
        return encode_constants_once(self._encode, blocks, importance)

    def fit_scales(self, sub_blocks: SubBlocks, n_blocks: int) -> BlockScales:
        """Search for the scales of least squared error; the mins and dmin are 0."""
        per_block = sub_blocks.x.shape[1] // n_blocks
        step = per_block * (_CPU_BLOCKS if sub_blocks.x.device.type == "cpu" else n_blocks)
        found = [self._fit(part, per_block) for part in sub_blocks.split(step)]
        d, scales = (torch.cat(values) for values in zip(*found, strict=True))
        return BlockScales(d, torch.zeros_like(d), scales, torch.zeros_like(scales))

    def pack_levels(self, scales: BlockScales, levels: Tensor) -> Tensor:
        """Write blocks whose weights have these levels, float32 (n, 256), as uint8 (n, type_size)."""
        return self.pack(scales.d / UNITS[self.name], scales.scales, levels)

    def fit_integers(self, sub_blocks: SubBlocks, d: Tensor, dmin: Tensor) -> tuple[Tensor, Tensor]:
        """Search for the integer scales of n sub-blocks whose d is given, float32 (n,); the mins are 0."""
        scale, integers = self._usual_scale(sub_blocks), self.search.scales
        candidates = self._candidates(sub_blocks, [scale])
        middle = integers.nearest(scale * reciprocal_or_zero(d))
        options = [integers.nearest(middle + integers.step * step) for step in _NEAR]
        errors = [candidates.error(d * option) for option in options]
        return select_best(errors, options)[0], torch.zeros_like(d)

    def rounding(self, scale: Tensor, offset: float | Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the function that rounds groups, float32 (n, together, rows), under scales of rows, (n, rows)."""
        flat = offset.flatten() if isinstance(offset, Tensor) else offset

        def round_groups(values: Tensor, metric: Tensor) -> Tensor:
            lanes = values.transpose(0, 1).reshape(self.together, -1)
            levels = self.nearest(lanes, scale.flatten(), metric, flat)
            return levels.view(self.together, *scale.shape).transpose(0, 1)

        return round_groups

    def offset(self, levels: Tensor) -> float | Tensor:
        """Return the offset in the levels of sub-blocks, float32 (n, size, rows) -> (n, rows), or 0."""
        return levels[:, 0] - levels[:, 0].round() if len(self.offsets) > 1 else 0.0

    def storable(self, factors: Tensor) -> Tensor:
        """Round values of d to what a block can store, float32 of any shape."""
        unit = UNITS[self.name]
        return round_to_float16(factors.clamp(min=0) / unit).mul_(unit)

    def nearest(
        self, values: Tensor, scale: Tensor, metric: Tensor | None = None, offset: float | Tensor = 0.0
    ) -> Tensor:
        """Round groups to the levels c of least error.

        Args:
            values: float32 (together, lanes).
            scale: float32 (lanes,), at least 0.
            metric: the importance w of each value, float32 (together, lanes), for the error sum w (x - scale * c)**2.
                Or upper triangular factors P, float32 (n, together, together), of lanes / n neighbors each, for the
                error ||(x - scale * c) P||**2. None is 1 for all.
            offset: one of `offsets`, or that of each lane, float32 (lanes,).

        Returns:
            The levels with their signs and offsets, float32 (together, lanes).
        """
        tried = list(self._tried(values, scale, metric, offset))
        if len(tried) == 1:
            return tried[0][0]
        levels, errors = zip(*tried, strict=True)
        return select_best(errors, [each.t() for each in levels])[0].t()

    def _encode(self, blocks: Tensor, importance: Tensor | None) -> Tensor:
        sub_blocks = SubBlocks.from_blocks(blocks, importance, self.size)
        scales = self.fit_scales(sub_blocks, len(blocks))
        levels = self._round(sub_blocks, scales)
        scales = self._refit(sub_blocks, scales, levels)
        return self.pack_levels(scales, levels.t().reshape(blocks.shape))

    def _fit(self, sub_blocks: SubBlocks, per_block: int) -> tuple[Tensor, Tensor]:
        """Return d, float32 (n,), and the scales, float32 (n, k), of n blocks."""
        d, scales, error = self._search(sub_blocks, per_block, self.search.tried)
        hard = torch.nonzero(self._is_hard(sub_blocks, d, per_block))[:, 0]
        if len(hard):
            part = sub_blocks.select_blocks(hard, per_block)
            better = self._search(part, per_block, HARD)
            d[hard], scales[hard], _ = best_of([(d[hard], scales[hard], error[hard]), better])
        low, high = sub_blocks.x.amin(0).view(-1, per_block), sub_blocks.x.amax(0).view(-1, per_block)
        constant = torch.nonzero(low.amin(1) == high.amax(1))[:, 0]
        if len(constant):
            levels = uniform_levels(self.name, d.device)
            levels = torch.cat([levels + offset + own for offset in self.offsets for own in self.group_offsets])
            values, unit = low[constant, 0].abs(), UNITS[self.name]
            d[constant], scales[constant] = fit_constants(values, levels, self.search.scales.high, unit)
        return d, scales

    def _is_hard(self, sub_blocks: SubBlocks, d: Tensor, per_block: int) -> Tensor:
        """Return which blocks need more scales, bool (n,)."""
        magnitudes = sub_blocks.x.abs()
        mean, mean_square = sub_blocks.weighted_sum(magnitudes), sub_blocks.weighted_sum(magnitudes.square())
        is_even = mean.square() > _EVEN_SHARE * mean_square * sub_blocks.total_importance()
        return is_even.view(-1, per_block).any(1) | (d < _SUBNORMAL * UNITS[self.name])

    def _search(self, sub_blocks: SubBlocks, per_block: int, tried: TriedScales) -> tuple[Tensor, Tensor, Tensor]:
        """Return d, (n,), the scales, (n, k), and the errors, (n,), of n blocks; all are float32."""
        unit = self._usual_scale(sub_blocks)
        candidates = self._candidates(sub_blocks, [unit * factor for factor in tried.of_candidates])
        options = [unit * factor for factor in tried.tried]
        scale = select_best([candidates.error(option) for option in options], options)[0].view(-1, per_block)
        unit = scale.amax(1) / self.search.scales.high
        best = self._best_integers(candidates, scale, [unit * factor for factor in tried.of_d])
        if not tried.of_refined_d:
            return best
        d, scales, _ = best
        found = (d[:, None] * scales).flatten()
        candidates = candidates.joined(self._candidates(sub_blocks, [found]))
        return self._best_integers(candidates, found.view_as(scale), [d * factor for factor in tried.of_refined_d])

    def _usual_scale(self, sub_blocks: SubBlocks) -> Tensor:
        """Return the real-valued scale that sub-blocks usually have, float32 (n,)."""
        squares = sub_blocks.x.square()
        mean = sub_blocks.weighted_sum(squares.square()) * reciprocal_or_zero(sub_blocks.weighted_sum(squares))
        return mean.sqrt() / self.search.anchor

    def _best_integers(
        self, candidates: Candidates, scale: Tensor, d: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Choose d from several, float32 (n,) each, and integers near the real-valued scales, float32 (n, k)."""
        fixed = UNITS[self.name]
        return best_of([self._integers(candidates, scale, round_to_float16(each / fixed) * fixed) for each in d])

    def _integers(self, candidates: Candidates, scale: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return d, the best integers near the real-valued scales, and the error of each block."""
        integers = self.search.scales
        middle = integers.nearest(scale * reciprocal_or_zero(d)[:, None])
        options = [integers.nearest(middle + step) for step in (0, -integers.step, integers.step)]
        errors = [candidates.error((d[:, None] * option).flatten()) for option in options]
        error, best = select_best(errors, errors, [option.flatten() for option in options])
        return d, best.view_as(scale), pairwise_sum(error.view_as(scale).t())

    def _candidates(self, sub_blocks: SubBlocks, scales: Sequence[Tensor]) -> Candidates:
        """Search for candidates under each of several scales of the sub-blocks, float32 (n,)."""
        x, w = self._groups(sub_blocks.x), None if sub_blocks.w is None else self._groups(sub_blocks.w)
        n_groups = self.size // self.together
        found = [self._sums(x, w, scale.repeat(n_groups)) for scale in scales]
        squares, products = (torch.stack(sums, 1) for sums in zip(*found, strict=True))
        shape = (*squares.shape[:3], -1, n_groups, sub_blocks.x.shape[1])
        return Candidates(squares.view(shape), products.view(shape))

    def _sums(self, x: Tensor, w: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums of `Candidates`, float32 (offsets, candidates, entries), under a scale of each group."""
        signs = likely_signs(self.name, x, scale, w, 1, even=self.even_signs)[0]
        x, w, scale = self._parts(x * signs), None if w is None else self._parts(w), scale.repeat(self._n_parts)
        entries = look_up(self.name, closest_rows(self.name, x, scale, w, _PARTS))
        found = []
        for offset in self.offsets:
            sums = [weighted_sums(x, w, entries + (offset + own)) for own in self.group_offsets]
            found.append([torch.cat(each) for each in zip(*sums, strict=True)])
        squares, products = (torch.stack(each) for each in zip(*found, strict=True))
        return squares, products * -2

    def _tried(
        self, values: Tensor, scale: Tensor, metric: Tensor | None, offset: float | Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the best levels under each choice of offsets and wrong signs, and their errors."""
        for own in self.group_offsets:
            if metric is not None and metric.dim() == 3:
                yield nearest_coupled(self.name, values, scale, metric, offset + own, even_signs=self.even_signs)
                continue
            for signs in likely_signs(self.name, values, scale, metric, _FLIPS, even=self.even_signs):
                levels = self._nearest(values, scale, metric, signs, offset + own)
                yield levels, weighted_error(values, scale, metric, levels)

    def _nearest(
        self, values: Tensor, scale: Tensor, w: Tensor | None, signs: Tensor, offset: float | Tensor
    ) -> Tensor:
        """Round groups to the levels of least error that have these signs and this offset."""
        x, w = self._parts((values - scale * offset) * signs), None if w is None else self._parts(w)
        scale = scale.repeat(self._n_parts)
        rows = closest_rows(self.name, x, scale, w, _PARTS)
        squares, products = weighted_sums(x, w, look_up(self.name, rows))
        best = (squares * scale - 2 * products).min(0, keepdim=True).indices
        entries = look_up(self.name, rows.gather(0, best)[0])
        return self._joined(entries) * signs + offset

    def _round(self, sub_blocks: SubBlocks, scales: BlockScales) -> Tensor:
        """Round the weights of n sub-blocks to levels, float32 (size, n)."""
        x, w = self._groups(sub_blocks.x), None if sub_blocks.w is None else self._groups(sub_blocks.w)
        scale = scales.effective()[0]
        repeated = scale.repeat(self.size // self.together)
        tried = [self._ungrouped(self.nearest(x, repeated, w, offset), len(scale)) for offset in self.offsets]
        errors = [weighted_error(sub_blocks.x, scale, sub_blocks.w, levels) for levels in tried]
        return select_best(errors, [levels.t() for levels in tried])[0].t()

    def _refit(self, sub_blocks: SubBlocks, scales: BlockScales, levels: Tensor) -> BlockScales:
        """Fit d of each block by least squares to its levels, float32 (size, n), and integer scales."""
        residual = SubBlocks(scales.residual(sub_blocks, levels), sub_blocks.w)
        xq, qq = (values.view_as(scales.scales) for values in residual.weighted_products(levels))
        xq, qq = pairwise_sum((xq * scales.scales).t()), pairwise_sum((qq * scales.scales.square()).t())
        unit = UNITS[self.name]
        d = round_to_float16((scales.d + xq * reciprocal_or_zero(qq)).clamp_(min=0) / unit) * unit
        return replace(scales, d=d)

    @property
    def _n_parts(self) -> int:
        """The number of entries that hold the levels of a group."""
        return self.together // GRID_WEIGHTS[self.name]

    def _groups(self, values: Tensor) -> Tensor:
        """Cut sub-blocks into groups: (size, n) -> (together, groups * n)."""
        return values.view(-1, self.together, values.shape[1]).transpose(0, 1).reshape(self.together, -1)

    def _ungrouped(self, values: Tensor, n: int) -> Tensor:
        """Undo `_groups`: (together, groups * n) -> (size, n)."""
        return values.view(self.together, -1, n).transpose(0, 1).reshape(self.size, n)

    def _parts(self, values: Tensor) -> Tensor:
        """Cut groups into the weights of an entry: (together, lanes) -> (dim, entries * lanes)."""
        n = self._n_parts
        return values.view(n, -1, values.shape[1]).transpose(0, 1).reshape(len(values) // n, -1)

    def _joined(self, values: Tensor) -> Tensor:
        """Undo `_parts`: (dim, entries * lanes) -> (together, lanes)."""
        return values.view(len(values), self._n_parts, -1).transpose(0, 1).reshape(self.together, -1)
