"""W4A8 and W6A8: codes of 4 or 6 bits for levels of an 8-bit grid, after a rotation.

The level of a code is its value times the E4M3 scale of its group, rounded. A weight is its level times the scale of
its row. "First" scales are those of kitchen: least squares, alternating with the nearest codes.

Source: comfy_kitchen 0.2.40 backends/eager/w4a8_int8.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .code_values import Codebook, CodeValues
from .fitted_table import SAMPLE, fitted_table, has_heavy_tails, histograms
from .float8 import MAX_E4M3_CODE, e4m3_values, nearest_e4m3, power_near
from .native_format import ROUNDED_ELEMENTS, NativeFormat, Part, Rounding, by_rows
from .rotation import Rotation, not_rotatable, rotate, rotate_as_kitchen

MAX_LEVEL = 127
_PASSES = 2
_LEAST_SCALE = 1e-8


@dataclass(frozen=True)
class LevelsFormat(NativeFormat):
    """A format of levels, with one way to give values to codes."""

    group: int
    """The number of weights that share a scale."""
    values: CodeValues
    """The values that kitchen gives to codes."""
    best_values: CodeValues
    """Those of the search."""
    fast_steps: tuple[int, ...]
    """The scales that kitchen tries, in steps of the E4M3 code from the first one."""
    best_steps: tuple[int, ...]
    rotates: ClassVar[bool] = True
    free_scale: ClassVar[str] = "weight_s_channel"

    def decode(
        self, parts: Mapping[str, Tensor], shape: tuple[int, ...] | None = None, undo: Rotation = rotate_as_kitchen
    ) -> Tensor:
        table = parts.get("weight_codebook")
        if table is None:
            table = self.values.table(parts["weight"].device)

        def values(weight: Tensor, scales: Tensor, row_scales: Tensor) -> tuple[Tensor, ...]:
            codes = self.values.unpack(weight.view(torch.uint8))
            levels = table[codes.long()].view(len(weight), -1, self.group) * e4m3_values(scales).unsqueeze(-1)
            rows = levels.round_().clamp_(-MAX_LEVEL, MAX_LEVEL).mul_(row_scales.view(-1, 1, 1))
            return (undo(rows.flatten(1)),)

        scales = parts["weight_s_rel"].view(torch.uint8)
        columns = scales.shape[1] * self.group
        return by_rows(values, parts["weight"], scales, parts["weight_s_channel"], columns=columns)[0]

    def _unfit(self, rows: int, columns: int) -> str | None:
        return not_rotatable(columns)

    def _tensors(self, rows: int, columns: int) -> tuple[Part, ...]:
        parts = (
            Part("weight", "I8", (rows, columns * self.values.bits // 8)),
            Part("weight_s_rel", "F8_E4M3", (rows, columns // self.group)),
            Part("weight_s_channel", "F32", (rows,)),
        )
        return (*parts, Part("weight_codebook", "F32", (16,))) if self.values.stored else parts

    def _encode(
        self, weight: Tensor, importance: Tensor | None, search: bool, rounding: Rounding | None
    ) -> dict[str, Tensor]:
        return self._with_table(weight, search)._encode_rows(weight, search, rounding)

    def _with_table(self, weight: Tensor, search: bool) -> LevelsFormat:
        """Return this format, with a table that is fitted to the weight if its tails are heavy and that helps."""
        usual = replace(self, values=self.best_values) if search else self
        if not self.values.stored:
            return usual
        sample = weight[:: max(1, weight.numel() // SAMPLE)].float()
        counts = histograms(rotate(sample).view(-1, self.group).T)
        if not has_heavy_tails(counts[0]):
            return usual

        def error(format: LevelsFormat) -> float:
            values = format.decode(format._encode_rows(sample, search, None))
            return float((values - sample).double().norm())

        fitted = (replace(self, values=Codebook(fitted_table(each))) for each in counts)
        return min((usual, *fitted), key=error)

    def _encode_rows(self, weight: Tensor, search: bool, rounding: Rounding | None) -> dict[str, Tensor]:
        steps = self.best_steps if search else self.fast_steps

        def encode(rows: Tensor) -> tuple[Tensor, ...]:
            n_rows = len(rows)
            rotated = rotate(rows.float())
            # A power of two brings each row near 1, so that kitchen's limits of 1e-8 do not touch tiny weights.
            unit = power_near(torch.linalg.vector_norm(rotated, torch.inf, 1))
            rotated.div_(unit.unsqueeze(1))
            # One row for each position in the group: operations on contiguous groups are several times faster.
            groups = rotated.view(-1, self.group).T.contiguous()
            scales, tops = self._least_squares(groups)
            row_scales = (tops.view(n_rows, -1).amax(1) / MAX_LEVEL).clamp_(min=_LEAST_SCALE)
            if rounding is not None:
                levels, best, factors = rounding(self, rotated.div_(row_scales.unsqueeze(1)))
                groups, best = levels.view(-1, self.group).T.contiguous(), _to_e4m3(best.flatten())
                row_scales = row_scales * factors.squeeze(1)
            else:
                by_group = row_scales.repeat_interleave(len(scales) // n_rows)
                groups.div_(by_group)
                best = self._best_scales(groups, _to_e4m3(scales / by_group), steps)
            codes = self._codes(groups, e4m3_values(best)).T.reshape(n_rows, -1)
            return self.values.pack(codes), best.view(n_rows, -1), row_scales * unit

        elements = 0 if rounding is None else ROUNDED_ELEMENTS
        codes, scales, row_scales = by_rows(encode, weight, columns=weight.shape[1], elements=elements)
        parts = {
            "weight": codes.view(torch.int8),
            "weight_s_rel": scales.view(torch.float8_e4m3fn),
            "weight_s_channel": row_scales,
        }
        return parts | ({"weight_codebook": self.values.table(weight.device).clone()} if self.values.stored else {})

    def nearest(self, values: Tensor, scales: Tensor) -> Tensor:
        """Return the levels nearest to values, float32 of any shape, that groups with these scales can have.

        Args:
            values: in units of the row's scale.
            scales: float32, E4M3 values that broadcast to the values.
        """
        scaled = _in_steps(values, scales)
        lower, upper = self.values.around(scaled)
        lower, upper = _levels(lower, scales), _levels(upper, scales)
        return torch.where((upper - values).abs_() < (lower - values).abs_(), upper, lower)

    def _least_squares(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Fit scales before they are rounded.

        Returns:
            The scale and the largest magnitude of each group: float32, (groups,).
        """
        scales = (groups.abs().amax(0) / self.values.top).clamp_(min=_LEAST_SCALE)
        for _ in range(_PASSES):
            nearest = self.values.nearest(groups / scales)
            squares = nearest.square().sum(0).clamp_(min=_LEAST_SCALE)
            scales = nearest.mul_(groups).sum(0).div_(squares).clamp_(min=_LEAST_SCALE)
        return scales, self.values.nearest(groups / scales).abs_().amax(0) * scales

    def _best_scales(self, groups: Tensor, first: Tensor, steps: tuple[int, ...]) -> Tensor:
        """Return the codes of the scales near `first` whose levels are nearest to the weights: uint8, (groups,)."""
        if not steps:
            return first
        best, least = first, self._error(groups, e4m3_values(first))
        for step in steps:
            scales = (first.int() + step).clamp_(1, MAX_E4M3_CODE).to(torch.uint8)
            error = self._error(groups, e4m3_values(scales))
            better = error < least
            best, least = torch.where(better, scales, best), torch.where(better, error, least)
        return best

    def _error(self, groups: Tensor, scales: Tensor) -> Tensor:
        lower, upper = self.values.around(_in_steps(groups, scales))
        below = _levels(lower, scales).sub_(groups).abs_()
        above = _levels(upper, scales).sub_(groups).abs_()
        return torch.minimum(below, above).square_().sum(0)

    def _codes(self, groups: Tensor, scales: Tensor) -> Tensor:
        """Return the codes of the nearest levels: uint8, shaped as the groups."""
        scaled = _in_steps(groups, scales)
        lower, upper = self.values.around(scaled)
        below = _levels(lower, scales).sub_(groups).abs_()
        above = _levels(upper, scales).sub_(groups).abs_()
        return self.values.codes(scaled, above < below)


def _in_steps(groups: Tensor, scales: Tensor) -> Tensor:
    # A group whose scale is 0 has only the level 0.
    return groups / torch.where(scales > 0, scales, 1)


def _levels(values: Tensor, scales: Tensor) -> Tensor:
    return values.mul_(scales).round_().clamp_(-MAX_LEVEL, MAX_LEVEL)


def _to_e4m3(scales: Tensor) -> Tensor:
    """Return the codes of the nearest E4M3 floats: uint8, of any shape."""
    return nearest_e4m3(scales).view(torch.uint8)
