"""Scale (and minimum) of single sub-blocks in real numbers: a grid of roundings, each solved by least squares.

Source: the grids of make_qx_quants, make_qkx3_quants and quantize_row_iq4_nl_impl in ggml-quants.c @ ggml 0.15.3, here
with the squared error itself as the measure and, where codes are signed, either sign for the scale.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .columns import Columns, float16, inverse, least
from .levels import Levels

# Of roundings whose errors differ by float32's last digits only, ggml's own counts: its d is more often exact.
_FAVOUR = 1 + 2.0**-20


def search_scale(columns: Columns, levels: Levels, peaks: Sequence[float], *, stored: bool) -> Tensor:
    """The scale s of x ~ s * q, (n,).

    Args:
        peaks: candidates for the level, in real numbers and of either sign, where the largest weight falls.
        stored: the scale is a block's d, a float16, which decides between roundings of like quality.
    """
    unit = inverse(columns.extreme())
    errors, scales = [], []
    for peak in peaks:
        q = levels.nearest(columns.x * (unit * peak))
        xq, qq = columns.products(q)
        scale = float16(xq * inverse(qq)) if stored else xq * inverse(qq)
        # The squared error less sum w x^2, which is the same for all.
        errors.append(scale * (scale * qq - 2 * xq))
        scales.append(scale)
    return least(errors, scales)[0]


def search_scale_and_min(
    columns: Columns, levels: Levels, peaks: Sequence[float], *, signed: bool, zero: bool = False
) -> tuple[Tensor, Tensor]:
    """The scale s and minimum m of x ~ s * q - m, each (n,); m is at least 0 unless `signed`.

    Args:
        peaks: candidates for the level where the largest weight falls when the smallest falls on 0, ggml's first.
        zero: also try lines through 0, which are best for a few large weights among small ones.
    """
    low, high = columns.x.amin(0), columns.x.amax(0)
    low = low if signed else low.clamp_(max=0)
    # Raised to begin at 0: where all weights lie far from 0, float32 would lose their differences in the sums.
    raised = Columns(columns.x - low, columns.w)
    unit, sx, sw = inverse(high - low), raised.sum(raised.x), raised.weight()
    errors, scales, mins = [], [], []
    for peak, through_zero in itertools.product(peaks, (False, True)[: 1 + zero]):
        q = raised.x * (unit * peak)
        if through_zero:
            level = low * unit * peak
            q += level - level.round()
        q = levels.nearest(q)
        sq, (xq, qq) = raised.sum(q), raised.products(q)
        scale, minimum = solve(sw, sx, sq, xq, qq, None if signed else low)
        # The squared error of a line less sum w x^2, which is the same for all; `solve` minimises it.
        errors.append(scale * (scale * qq - 2 * (xq + minimum * sq)) + minimum * (minimum * sw + 2 * sx))
        scales.append(scale)
        mins.append(minimum - low)
    errors[0] *= _FAVOUR
    scale, minimum = least(errors, scales, mins)
    return scale, minimum


def solve(
    sw: Tensor, sx: Tensor, sq: Tensor, xq: Tensor, qq: Tensor, lowest: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Least squares for x ~ s * q - m, where m is at least `lowest`.

    Without a unique or an allowed solution, that for m = `lowest`, or 0 where there is no bound, or, if q = 0, s = 0.
    """
    determinant = sw * qq - sq * sq
    minimum = (sq * xq - qq * sx) * inverse(determinant)
    solved = determinant > 1e-5 * sw * qq
    bound = torch.zeros_like(sx) if lowest is None else lowest
    flat = -sx * inverse(sw)
    if lowest is not None:
        solved &= minimum > lowest
        flat = torch.maximum(flat, lowest)
    scale = torch.where(solved, (sw * xq - sx * sq) * inverse(determinant), (xq + bound * sq) * inverse(qq))
    return scale, torch.where(solved, minimum, torch.where(qq > 0, bound, flat))
