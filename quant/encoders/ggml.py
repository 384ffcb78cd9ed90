"""ggml's own encoders of the types whose scales it searches for, K-quants and IQ4, bit for bit.

`encode_*`: (n, block_size) float32 -> (n, type_size) uint8, as ggml encodes without an importance matrix; they ignore
`importance`. Sub-blocks are the columns of (size, n) matrices. Sums run from the first row to the last, and each
product, sum and quotient is rounded on its own, as in C loops without fused arithmetic.

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
from .search.columns import inverse
from .search.levels import Codebook

# Without minima, magnitudes below it count as 0.
_EPSILON = 1e-15
# By device type, where torch's square root is not always the nearest number: MKL's may be off by the last bit.
_ROOTS = {"cpu": torch.float64}
_IQ4 = Codebook(KVALUES)


def encode_q2_k(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    x = _columns(blocks, 16)
    steps = (0.1 * torch.arange(16) - 0.5) + 3
    scale, minimum, kept = _line(x, x.abs(), 3, steps, torch.abs)
    (d, scale), (dmin, minimum) = _integers(scale.view(-1, 16), 15), _integers(minimum.view(-1, 16), 15)
    # Bits beyond a scale's four run into its neighbour's.
    both = scale | minimum << 4
    scales, mins = both & 15, both >> 4 & 15
    return pack_q2_k(d, dmin, scales, mins, _codes(x, d[:, None] * scales, 0, 3, kept, dmin[:, None] * mins))


def encode_q3_k(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    x = _columns(blocks, 16)
    scale, kept = _descend(x)
    peak = _largest(scale.view(-1, 16), 1)
    unit = torch.tensor(-32.0) / peak
    scales = torch.where(peak == 0, -32, _nearest_int(unit * scale.view(-1, 16)).clamp_(-32, 31))
    d = torch.where(peak == 0, 0.0, unit.reciprocal()).half().float()
    return pack_q3_k(d[:, 0], scales, _codes(x, d * scales, -4, 3, kept))


def encode_q4_k(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    return pack_q4_k(*_affine(blocks, 15, (0.1 * torch.arange(21) - 1) + 15))


def encode_q5_k(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    return pack_q5_k(*_affine(blocks, 31, (0.1 * torch.arange(16) - 0.5) + 31))


def encode_q6_k(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    x = _columns(blocks, 16)
    w = x * x
    wx = w * x

    def sums(unit: Tensor) -> tuple[Tensor, Tensor]:
        q = _rounded(x * unit, -32, 31)
        return _sum(wx * q), _sum((w * q).mul_(q))

    largest = _largest(x, 0)[0]
    steps = torch.tensor([0, *range(-9, 0), *range(1, 10)])
    scale, unit = _scale([step / largest for step in -(32 + 0.1 * steps)], sums)
    empty = largest.abs() < _EPSILON
    scale = scale.masked_fill(empty, 0).view(-1, 16)
    kept = _rounded(x * unit, -32, 31).masked_fill_(empty, -32)
    peak = _largest(scale, 1)
    empty = peak.abs() < _EPSILON
    unit = torch.tensor(-128.0) / peak
    scales = _nearest_int(unit * scale).clamp_(max=127).masked_fill_(empty, 0)
    d = unit.reciprocal().masked_fill_(empty, 0).half().float()
    kept = kept.masked_fill_(empty.expand_as(scale).reshape(-1), -32)
    return pack_q6_k(d[:, 0], scales, _codes(x, d * scales, -32, 31, kept))


def encode_iq4_nl(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    x = _columns(blocks, 32)
    scale = _iq4_scale(x)
    return pack_iq4_nl(scale, _iq4_codes(x, scale).contiguous())


def encode_iq4_xs(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    x = _columns(blocks, 32)
    scale = _iq4_scale(x).view(-1, 8)
    d = _largest(scale, 1) / -32
    scales = _rounded(inverse(d) * scale, -32, 31)
    return pack_iq4_xs(d[:, 0], scales, _iq4_codes(x, (d * scales).view(-1)).reshape(-1, 256))


def _affine(blocks: Tensor, largest: int, steps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Fields of Q4_K and Q5_K."""
    x = _columns(blocks, 32)
    scale, minimum, kept = _line(x, x.abs() + _root(_sum(x * x) / 32), largest, steps, torch.square)
    (d, scale), (dmin, minimum) = _integers(scale.view(-1, 8), 63), _integers(minimum.view(-1, 8), 63)
    scales, mins = ((values & 255).clamp_(max=63) for values in (scale, minimum))
    return d, dmin, scales, mins, _codes(x, d[:, None] * scales, 0, largest, kept, dmin[:, None] * mins)


def _line(
    x: Tensor, w: Tensor, largest: int, steps: Tensor, measure: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and minimum of x ~ scale * q - minimum, (n,), and q, (size, n)."""

    def error(scale: Tensor, low: Tensor) -> Tensor:
        return _sum(measure((q * scale).add_(low).sub_(x)).mul_(w))

    low, high = x.amin(0).clamp_(max=0), x.amax(0)
    sw, sx, flat = _sum(w), _sum(w * x), low == high
    unit = torch.tensor(float(largest)) / (high - low)
    q = _rounded((x - low) * _finite(unit), 0, largest)
    scale = unit.reciprocal()
    best, chosen = error(scale, low), (low, unit)
    for step in steps:
        unit = step / (high - low)
        q = _rounded((x - low) * _finite(unit), 0, largest)
        wq = w * q
        sq, qq, xq = _sum(wq), _sum(wq * q), _sum(wq * x)
        determinant = sw * qq - sq * sq
        slope, start = (sw * xq - sx * sq) / determinant, (qq * sx - sq * xq) / determinant
        above = start > 0
        slope, start = torch.where(above, xq / qq, slope), start.masked_fill(above, 0)
        found = error(slope, start)
        better = (determinant > 0) & (found < best)
        best = torch.where(better, found, best)
        chosen = torch.where(better, low, chosen[0]), torch.where(better, unit, chosen[1])
        # Later steps begin from this minimum.
        scale, low = torch.where(better, slope, scale), torch.where(better, start, low)
    q = _rounded((x - chosen[0]) * _finite(chosen[1]), 0, largest)
    return scale.masked_fill(flat, 0), -low, q.masked_fill_(flat, 0)


def _descend(x: Tensor) -> tuple[Tensor, Tensor]:
    """Q3_K's scales, (n,), and codes, (16, n), which change one after the other while the fit gets better."""
    largest = _largest(x, 0)[0]
    q = _rounded(x * (torch.tensor(-4.0) / largest), -4, 3)
    w = x * x
    wx = w * x
    xq, qq = _sum(wx * q), _sum((w * q).mul_(q))
    for _ in range(5):
        for value, weight, product, code in zip(x, w, wx, q, strict=True):
            xq_rest, qq_rest = xq - product * code, qq - weight * code * code
            new = _nearest_int(value * qq_rest / xq_rest).clamp_(-4, 3).float()
            xq_new, qq_new = xq_rest + product * new, qq_rest + weight * new * new
            better = (xq_rest > 0) & (new != code) & (qq_new > 0) & (xq_new * xq_new * qq > xq * xq * qq_new)
            code.copy_(torch.where(better, new, code))
            xq, qq = torch.where(better, xq_new, xq), torch.where(better, qq_new, qq)
    empty = largest.abs() < _EPSILON
    return torch.where(qq > 0, xq / qq, 0.0).masked_fill_(empty, 0), q.masked_fill_(empty, -4)


def _iq4_scale(x: Tensor) -> Tensor:
    w = x * x

    def sums(unit: Tensor) -> tuple[Tensor, Tensor]:
        q = _IQ4.nearest(x * unit)
        wq = w * q
        return _sum(wq * x), _sum(wq.mul_(q))

    largest = _largest(x, 0)[0]
    first = quotient(largest, -KVALUES[0]).reciprocal()
    units = [first, *(step / largest for step in torch.arange(-7.0, 8) + KVALUES[0])]
    scale, _ = _scale(map(_finite, units), sums)
    return scale.masked_fill(largest.abs() < _EPSILON, 0)


def _iq4_codes(x: Tensor, scale: Tensor) -> Tensor:
    return _IQ4.codes(_IQ4.nearest(x * inverse(scale))).t()


def _scale(units: Iterable[Tensor], sums: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The scale of the unit whose sums of w x q and w q q fit best, and that unit, each (n,)."""
    first, *rest = units
    xq, qq = sums(first)
    scale, chosen = torch.where(qq > 0, xq / qq, 0.0), first
    best = scale * xq
    for unit in rest:
        xq, qq = sums(unit)
        better = (qq > 0) & (xq * xq > best * qq)
        scale, chosen = torch.where(better, xq / qq, scale), torch.where(better, unit, chosen)
        best = torch.where(better, scale * xq, best)
    return scale, chosen


def _integers(values: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Of (n, k) values d, (n,), a float16 in float32, and what they are in its units, int32."""
    peak = values.amax(1, keepdim=True).clamp_(min=0).add_(0.0)
    unit = torch.where(peak > 0, torch.tensor(float(largest)) / peak, 0.0)
    return quotient(peak[:, 0], largest).half().float(), _nearest_int(unit * values)


def _codes(x: Tensor, scale: Tensor, low: int, high: int, kept: Tensor, minimum: Tensor | None = None) -> Tensor:
    """(n, 256) codes of the stored scales, (n, k); those of the search, `kept`, where a scale is 0."""
    raised = x if minimum is None else x + minimum.view(-1)
    scale = scale.view(-1)
    codes = torch.where(scale == 0, kept, _nearest_int(raised / scale).clamp_(low, high))
    return codes.t().reshape(-1, 256)


def _columns(blocks: Tensor, size: int) -> Tensor:
    return blocks.nan_to_num(0.0).reshape(-1, size).t().contiguous()


def _sum(values: Tensor) -> Tensor:
    """(size, n) -> (n,), from the first row to the last."""
    result = values[0] + 0.0
    for row in values[1:]:
        result += row
    return result


def _root(values: Tensor) -> Tensor:
    return values.to(_ROOTS.get(values.device.type, torch.float32)).sqrt().float()


def _largest(values: Tensor, dim: int) -> Tensor:
    """The value of the largest magnitude, the first of equal ones; +0 if all are zeros."""
    return values.gather(dim, values.abs().argmax(dim, keepdim=True)) + 0.0


def _rounded(values: Tensor, low: int, high: int) -> Tensor:
    """In place; of use where ggml's `nearest_int` is within its range."""
    return values.round_().clamp_(low, high)


def _nearest_int(values: Tensor) -> Tensor:
    """As int32, halves to even; beyond 2**22 what remains in the last bits of the sum."""
    return (values + 12582912.0).view(torch.int32).bitwise_and_(0x7FFFFF).sub_(0x400000)


def _finite(unit: Tensor) -> Tensor:
    """Of a subnormal range, whose infinite unit ggml's `nearest_int` turns into codes of 0."""
    return unit.nan_to_num(0.0, 0.0, 0.0)
