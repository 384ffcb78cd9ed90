"""The real-valued scale, and min, of each sub-block on its own.

The weights are rounded to levels once for each of several anchors. Least squares then gives the scale (and min) for
each rounding, and the one with the smallest squared error is kept.

Source: the grids of make_qx_quants, make_qkx3_quants and quantize_row_iq4_nl_impl in ggml-quants.c @ ggml 0.15.3.
Unlike ggml, the measure here is the squared error itself. Where levels have both signs, scales of both signs are tried.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .levels import Levels
from .sub_blocks import SubBlocks, reciprocal_or_zero, round_to_float16, select_best

# Among roundings whose errors differ only in the last digits of a float32, ggml's own wins: its d is more often exact.
_PREFERENCE = 1 + 2.0**-20


def search_scale(sub_blocks: SubBlocks, levels: Levels, anchors: Sequence[float], *, is_stored: bool) -> Tensor:
    """Find the scale s of x ~ s * q for each sub-block, where q are levels.

    Args:
        anchors: real numbers of either sign, to which the weight of largest magnitude is mapped in turn.
        is_stored: the scale is a block's d itself. It is then rounded to float16 before errors are compared.

    Returns:
        float32 (n,).
    """
    unit = reciprocal_or_zero(sub_blocks.signed_amax())
    errors, scales = [], []
    for anchor in anchors:
        q = levels.nearest(sub_blocks.x * (unit * anchor))
        xq, qq = sub_blocks.weighted_products(q)
        scale = xq * reciprocal_or_zero(qq)
        if is_stored:
            scale = round_to_float16(scale)
        # The squared error without the term sum w x^2, which is the same for all anchors.
        errors.append(scale * (scale * qq - 2 * xq))
        scales.append(scale)
    return select_best(errors, scales)[0]


def search_scale_and_min(
    sub_blocks: SubBlocks, levels: Levels, anchors: Sequence[float], *, signed: bool, through_zero: bool = False
) -> tuple[Tensor, Tensor]:
    """Find the scale s and the min m of x ~ s * q - m for each sub-block, where q are levels.

    Args:
        anchors: real numbers to which the largest weight is mapped in turn while the smallest is mapped to 0. ggml's
            own comes first.
        signed: m may be negative.
        through_zero: also round so that 0 falls on a level. This is best for a few large weights among small ones.

    Returns:
        s and m, float32 (n,).
    """
    low, high = sub_blocks.x.amin(0), sub_blocks.x.amax(0)
    low = low if signed else low.clamp_(max=0)
    # Shifted to begin at 0. Otherwise float32 sums would lose the differences of weights that all lie far from 0.
    shifted = SubBlocks(sub_blocks.x - low, sub_blocks.w)
    unit, sx, sw = reciprocal_or_zero(high - low), shifted.weighted_sum(shifted.x), shifted.total_importance()
    errors, scales, mins = [], [], []
    for anchor, zero_is_level in itertools.product(anchors, (False, True)[: 1 + through_zero]):
        q = shifted.x * (unit * anchor)
        if zero_is_level:
            zero = low * unit * anchor
            q += zero - zero.round()
        q = levels.nearest(q)
        sq, (xq, qq) = shifted.weighted_sum(q), shifted.weighted_products(q)
        scale, minimum = solve(sw, sx, sq, xq, qq, None if signed else low)
        # The squared error without the term sum w x^2, which is the same for all roundings; `solve` minimizes it.
        errors.append(scale * (scale * qq - 2 * (xq + minimum * sq)) + minimum * (minimum * sw + 2 * sx))
        scales.append(scale)
        mins.append(minimum - low)
    errors[0] *= _PREFERENCE
    scale, minimum = select_best(errors, scales, mins)
    return scale, minimum


def solve(
    sw: Tensor, sx: Tensor, sq: Tensor, xq: Tensor, qq: Tensor, lowest: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Solve x ~ s * q - m for s and m by weighted least squares, where m is at least `lowest`.

    Where that has no unique solution, or none within the bound, only s is solved for. m is then `lowest`, or 0 without
    a bound. Where all q are 0, only m is solved for.

    Args:
        sw, sx, sq, xq, qq: the sums of w, w * x, w * q, w * x * q and w * q * q, float32 (n,).
        lowest: the smallest allowed m, float32 (n,), or None for no bound.

    Returns:
        s and m, float32 (n,).
    """
    determinant = sw * qq - sq * sq
    minimum = (sq * xq - qq * sx) * reciprocal_or_zero(determinant)
    solved = determinant > 1e-5 * sw * qq
    bound = torch.zeros_like(sx) if lowest is None else lowest
    mean = -sx * reciprocal_or_zero(sw)
    if lowest is not None:
        solved &= minimum > lowest
        mean = torch.maximum(mean, lowest)
    scale = torch.where(
        solved, (sw * xq - sx * sq) * reciprocal_or_zero(determinant), (xq + bound * sq) * reciprocal_or_zero(qq)
    )
    return scale, torch.where(solved, minimum, torch.where(qq > 0, bound, mean))
