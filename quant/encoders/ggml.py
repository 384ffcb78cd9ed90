"""ggml's own encoders for K-quants and IQ4, whose scales it searches for, with bit-equal results.

`encode_*` takes blocks, float32 (n, block_size), and returns uint8 (n, type_size). The bytes are those that ggml writes
without an importance matrix; `importance` is ignored.

Below, n sub-blocks of `size` weights are the columns of a matrix `x`, float32 (size, n). `w`, of the same shape, is how
much each weight's error counts. `q` are codes as float32. A `unit` is the reciprocal of a scale: q ~ x * unit.

ggml's loops add the elements of a sub-block one after the other, without fused arithmetic. So here sums run from the
first row to the last, and each product, sum and quotient is rounded on its own.

Source: ggml-quants.c quantize_row_q{2,3,4,5,6}_K_ref, make_q{kx2,3,x}_quants, quantize_iq4_{nl,xs} @ ggml 0.15.3;
checked against 0.20.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..formats.bits import quotient
from ..formats.iq4 import KVALUES, pack_iq4_nl, pack_iq4_xs
from ..formats.kquants import pack_q2_k, pack_q3_k, pack_q4_k, pack_q5_k, pack_q6_k
from .search.levels import Codebook
from .search.sub_blocks import reciprocal_or_zero

# In types without mins, a sub-block with no larger magnitude counts as all zeros.
_EPSILON = 1e-15
# The dtype to take square roots in, by device type, where torch's are not always the nearest float32. On a CPU, MKL's
# may be wrong in the last bit.
_SQUARE_ROOT_DTYPES = {"cpu": torch.float64}
_IQ4 = Codebook(KVALUES)


def encode_q2_k(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    x = _sub_blocks(blocks, 16)
    steps = (0.1 * torch.arange(16) - 0.5) + 3
    scale, minimum, q = _search_scale_and_min(x, x.abs(), 3, steps, torch.abs)
    (d, scale), (dmin, minimum) = _to_integers(scale.view(-1, 16), 15), _to_integers(minimum.view(-1, 16), 15)
    # As in ggml, which does not mask them, bits of a scale beyond its four change the min in the same byte.
    both = scale | minimum << 4
    scales, mins = both & 15, both >> 4 & 15
    return pack_q2_k(d, dmin, scales, mins, _final_codes(x, d[:, None] * scales, 0, 3, q, dmin[:, None] * mins))


def encode_q3_k(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    x = _sub_blocks(blocks, 16)
    scale, q = _coordinate_descent(x)
    amax = _signed_amax(scale.view(-1, 16), 1)
    unit = torch.tensor(-32.0) / amax
    scales = torch.where(amax == 0, -32, _nearest_int(unit * scale.view(-1, 16)).clamp_(-32, 31))
    d = torch.where(amax == 0, 0.0, unit.reciprocal()).half().float()
    return pack_q3_k(d[:, 0], scales, _final_codes(x, d * scales, -4, 3, q))


def encode_q4_k(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    return pack_q4_k(*_encode_with_mins(blocks, 15, (0.1 * torch.arange(21) - 1) + 15))


def encode_q5_k(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    return pack_q5_k(*_encode_with_mins(blocks, 31, (0.1 * torch.arange(16) - 0.5) + 31))


def encode_q6_k(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    x = _sub_blocks(blocks, 16)
    w = x * x
    wx = w * x

    def sums(unit: Tensor) -> tuple[Tensor, Tensor]:
        q = _round_(x * unit, -32, 31)
        return _sum(wx * q), _sum((w * q).mul_(q))

    amax = _signed_amax(x, 0)[0]
    steps = torch.tensor([0, *range(-9, 0), *range(1, 10)])
    scale, unit = _search_scale([step / amax for step in -(32 + 0.1 * steps)], sums)
    is_empty = amax.abs() < _EPSILON
    scale = scale.masked_fill(is_empty, 0).view(-1, 16)
    q = _round_(x * unit, -32, 31).masked_fill_(is_empty, -32)
    amax = _signed_amax(scale, 1)
    is_empty = amax.abs() < _EPSILON
    unit = torch.tensor(-128.0) / amax
    scales = _nearest_int(unit * scale).clamp_(max=127).masked_fill_(is_empty, 0)
    d = unit.reciprocal().masked_fill_(is_empty, 0).half().float()
    q = q.masked_fill_(is_empty.expand_as(scale).reshape(-1), -32)
    return pack_q6_k(d[:, 0], scales, _final_codes(x, d * scales, -32, 31, q))


def encode_iq4_nl(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    x = _sub_blocks(blocks, 32)
    scale = _iq4_scale(x)
    return pack_iq4_nl(scale, _iq4_codes(x, scale).contiguous())


def encode_iq4_xs(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    x = _sub_blocks(blocks, 32)
    scale = _iq4_scale(x).view(-1, 8)
    d = _signed_amax(scale, 1) / -32
    scales = _round_(reciprocal_or_zero(d) * scale, -32, 31)
    return pack_iq4_xs(d[:, 0], scales, _iq4_codes(x, (d * scales).view(-1)).reshape(-1, 256))


def _encode_with_mins(blocks: Tensor, largest: int, steps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return d, dmin, the integer scales and mins, and the codes up to `largest` of Q4_K or Q5_K."""
    x = _sub_blocks(blocks, 32)
    w = x.abs() + _square_root(_sum(x * x) / 32)
    scale, minimum, q = _search_scale_and_min(x, w, largest, steps, torch.square)
    (d, scale), (dmin, minimum) = _to_integers(scale.view(-1, 8), 63), _to_integers(minimum.view(-1, 8), 63)
    scales, mins = ((values & 255).clamp_(max=63) for values in (scale, minimum))
    return d, dmin, scales, mins, _final_codes(x, d[:, None] * scales, 0, largest, q, dmin[:, None] * mins)


def _search_scale_and_min(
    x: Tensor, w: Tensor, largest: int, steps: Tensor, measure: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the scale and the min of x ~ scale * q - min for each sub-block (ggml: make_qkx2_quants).

    Args:
        largest: the largest code.
        steps: real numbers around `largest`, float32 (k,). The largest weight is mapped to each of them in turn.
        measure: takes the error of each weight to what is summed up, torch.abs or torch.square.

    Returns:
        The scale and the min, float32 (n,), and q, float32 (size, n).
    """

    def error(scale: Tensor, low: Tensor) -> Tensor:
        return _sum(measure((q * scale).add_(low).sub_(x)).mul_(w))

    low, high = x.amin(0).clamp_(max=0), x.amax(0)
    sw, sx, is_constant = _sum(w), _sum(w * x), low == high
    unit = torch.tensor(float(largest)) / (high - low)
    q = _round_((x - low) * _zero_if_infinite(unit), 0, largest)
    scale = unit.reciprocal()
    best, chosen = error(scale, low), (low, unit)
    for step in steps:
        unit = step / (high - low)
        q = _round_((x - low) * _zero_if_infinite(unit), 0, largest)
        wq = w * q
        sq, qq, xq = _sum(wq), _sum(wq * q), _sum(wq * x)
        determinant = sw * qq - sq * sq
        slope, start = (sw * xq - sx * sq) / determinant, (qq * sx - sq * xq) / determinant
        # The min, -start, cannot be negative.
        is_above = start > 0
        slope, start = torch.where(is_above, xq / qq, slope), start.masked_fill(is_above, 0)
        found = error(slope, start)
        is_better = (determinant > 0) & (found < best)
        best = torch.where(is_better, found, best)
        chosen = torch.where(is_better, low, chosen[0]), torch.where(is_better, unit, chosen[1])
        # As in ggml, later steps begin from this min.
        scale, low = torch.where(is_better, slope, scale), torch.where(is_better, start, low)
    q = _round_((x - chosen[0]) * _zero_if_infinite(chosen[1]), 0, largest)
    return scale.masked_fill(is_constant, 0), -low, q.masked_fill_(is_constant, 0)


def _coordinate_descent(x: Tensor) -> tuple[Tensor, Tensor]:
    """Find Q3_K's scales, float32 (n,), and codes, float32 (16, n) (ggml: make_q3_quants).

    One code after the other is changed if that lowers the error of least squares, in five passes over all codes.
    """
    amax = _signed_amax(x, 0)[0]
    q = _round_(x * (torch.tensor(-4.0) / amax), -4, 3)
    w = x * x
    wx = w * x
    xq, qq = _sum(wx * q), _sum((w * q).mul_(q))
    for _ in range(5):
        for value, weight, product, code in zip(x, w, wx, q, strict=True):
            xq_rest, qq_rest = xq - product * code, qq - weight * code * code
            new = _nearest_int(value * qq_rest / xq_rest).clamp_(-4, 3).float()
            xq_new, qq_new = xq_rest + product * new, qq_rest + weight * new * new
            is_better = (xq_rest > 0) & (new != code) & (qq_new > 0) & (xq_new * xq_new * qq > xq * xq * qq_new)
            code.copy_(torch.where(is_better, new, code))
            xq, qq = torch.where(is_better, xq_new, xq), torch.where(is_better, qq_new, qq)
    is_empty = amax.abs() < _EPSILON
    return torch.where(qq > 0, xq / qq, 0.0).masked_fill_(is_empty, 0), q.masked_fill_(is_empty, -4)


def _iq4_scale(x: Tensor) -> Tensor:
    """Find the scale of each sub-block for IQ4's codebook, float32 (n,)."""
    w = x * x

    def sums(unit: Tensor) -> tuple[Tensor, Tensor]:
        q = _IQ4.nearest(x * unit)
        wq = w * q
        return _sum(wq * x), _sum(wq.mul_(q))

    amax = _signed_amax(x, 0)[0]
    first = quotient(amax, -KVALUES[0]).reciprocal()
    units = [first, *(step / amax for step in torch.arange(-7.0, 8) + KVALUES[0])]
    scale, _ = _search_scale(map(_zero_if_infinite, units), sums)
    return scale.masked_fill(amax.abs() < _EPSILON, 0)


def _iq4_codes(x: Tensor, scale: Tensor) -> Tensor:
    """Return the code of each weight under the scales, float32 (n,), of its sub-block: float32 (n, size)."""
    return _IQ4.codes(_IQ4.nearest(x * reciprocal_or_zero(scale))).t()


def _search_scale(units: Iterable[Tensor], sums: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Find the scale of x ~ scale * q for each sub-block by least squares.

    Args:
        units: reciprocals of scales, float32 (n,), by which the weights are rounded to q in turn.
        sums: returns the sums of w * x * q and of w * q * q for a unit, float32 (n,).

    Returns:
        The best scale and the unit that gave it, float32 (n,).
    """
    first, *rest = units
    xq, qq = sums(first)
    scale, chosen = torch.where(qq > 0, xq / qq, 0.0), first
    best = scale * xq
    for unit in rest:
        xq, qq = sums(unit)
        is_better = (qq > 0) & (xq * xq > best * qq)
        scale, chosen = torch.where(is_better, xq / qq, scale), torch.where(is_better, unit, chosen)
        best = torch.where(is_better, scale * xq, best)
    return scale, chosen


def _to_integers(values: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Express the scales or mins of n blocks of k sub-blocks as integer multiples of one factor per block.

    Args:
        values: float32 (n, k).
        largest: the integer that the largest value of a block becomes.

    Returns:
        The factors, float16 values as float32 (n,), and the integers, int32 (n, k).
    """
    amax = values.amax(1, keepdim=True).clamp_(min=0).add_(0.0)
    unit = torch.where(amax > 0, torch.tensor(float(largest)) / amax, 0.0)
    return quotient(amax[:, 0], largest).half().float(), _nearest_int(unit * values)


def _final_codes(x: Tensor, scale: Tensor, low: int, high: int, q: Tensor, minimum: Tensor | None = None) -> Tensor:
    """Round the weights again, now by the effective scales and mins as the block stores them.

    Args:
        scale, minimum: float32 (blocks, sub-blocks per block).
        low, high: the range of the codes.
        q: the codes that the search found, float32 (size, n). They are used where a scale is 0.

    Returns:
        Codes as float32 (blocks, 256).
    """
    shifted = x if minimum is None else x + minimum.view(-1)
    scale = scale.view(-1)
    codes = torch.where(scale == 0, q, _nearest_int(shifted / scale).clamp_(low, high))
    return codes.t().reshape(-1, 256)


def _sub_blocks(blocks: Tensor, size: int) -> Tensor:
    """Cut blocks, float32 (n_blocks, block_size), into sub-blocks, float32 (size, n); NaN becomes 0."""
    return blocks.nan_to_num(0.0).reshape(-1, size).t().contiguous()


def _sum(values: Tensor) -> Tensor:
    """Add the rows from the first to the last, (size, n) -> (n,)."""
    result = values[0] + 0.0
    for row in values[1:]:
        result += row
    return result


def _square_root(values: Tensor) -> Tensor:
    return values.to(_SQUARE_ROOT_DTYPES.get(values.device.type, torch.float32)).sqrt().float()


def _signed_amax(values: Tensor, dim: int) -> Tensor:
    """Return the value of the largest magnitude with its sign, the first of equal ones; all zeros give +0."""
    return values.gather(dim, values.abs().argmax(dim, keepdim=True)) + 0.0


def _round_(values: Tensor, low: int, high: int) -> Tensor:
    """Round to the integers from `low` to `high` in place; equals `_nearest_int` within the range of that."""
    return values.round_().clamp_(low, high)


def _nearest_int(values: Tensor) -> Tensor:
    """Round to int32 as ggml's `nearest_int` does, halves to even; the results are meaningless beyond 2**22."""
    return (values + 12582912.0).view(torch.int32).bitwise_and_(0x7FFFFF).sub_(0x400000)


def _zero_if_infinite(unit: Tensor) -> Tensor:
    """Return 0 for infinite units, which subnormal ranges have: ggml's `nearest_int` turns these into codes of 0."""
    return unit.nan_to_num(0.0, 0.0, 0.0)
