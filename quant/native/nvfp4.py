"""NVFP4: four-bit floats (E2M1), an E4M3 scale for 16 of them, and one scale for the weight.

Source: comfy_kitchen 0.2.40 backends/eager/quantization.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..device import cached_on_device
from .float8 import MAX_E4M3_CODE, cropped, e4m3_values, nearest_e4m3, padded, scale_of
from .native_format import ROUNDED_ELEMENTS, NativeFormat, Part, Rounding, by_rows, largest
from .packing import from_tiles, pack_nibbles, tiled_shape, to_tiles, unpack_nibbles
from .rotation import Rotation, rotate_as_kitchen

BLOCK = 16
TOP = 6.0
_MAX_SCALE = 448.0
_EXPONENT_BITS = 0x7F800000
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Scales to try, in steps of the E4M3 code. A larger one serves blocks whose largest value is alone, a smaller one
# clips it.
_STEPS = (-3, -2, -1, 1, 2, 3, 4, 5, 6, 7)


class NVFP4(NativeFormat):
    """Four-bit floats with scales of two kinds."""

    free_scale, multiple = "weight_scale_2", BLOCK

    def decode(
        self, parts: Mapping[str, Tensor], shape: tuple[int, ...] | None = None, undo: Rotation = rotate_as_kitchen
    ) -> Tensor:
        packed = parts["weight"]
        n_rows, columns = packed.shape[0], 2 * packed.shape[1]
        scales = from_tiles(parts["weight_scale"].view(torch.uint8), n_rows, columns // BLOCK)
        table = _table(packed.device)

        def values(packed: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
            total = parts["weight_scale_2"] * e4m3_values(scales)
            codes = unpack_nibbles(packed, high_first=True)
            blocks = table[codes.long()].view(len(codes), -1, BLOCK) * total.unsqueeze(-1)
            return (blocks.flatten(1),)

        return cropped(by_rows(values, packed, scales, columns=columns)[0], shape)

    def _tensors(self, rows: int, columns: int) -> tuple[Part, ...]:
        rows, columns = padded(rows, columns, BLOCK)
        return (
            Part("weight", "U8", (rows, columns // 2)),
            Part("weight_scale", "F8_E4M3", tiled_shape(rows, columns // BLOCK)),
            Part("weight_scale_2", "F32", ()),
        )

    def _encode(
        self, weight: Tensor, importance: Tensor | None, search: bool, rounding: Rounding | None
    ) -> dict[str, Tensor]:
        n_rows, n_columns = weight.shape
        all_rows, all_columns = padded(n_rows, n_columns, BLOCK)
        right = (0, all_columns - n_columns)
        tensor_scale = scale_of(largest(weight), _MAX_SCALE * TOP)
        if importance is not None:
            importance = pad(importance, right).view(-1, BLOCK)

        def encode(rows: Tensor) -> tuple[Tensor, ...]:
            rows = pad(rows.float(), right)
            if rounding is not None:
                levels, chosen, _ = rounding(self, rows / tensor_scale)
                scales = nearest_e4m3(chosen).view(torch.uint8)
                codes = _codes(levels)
            else:
                # One row for each position in the block: operations on contiguous blocks are several times faster.
                columns = rows.view(-1, BLOCK).T.contiguous()
                factors = None if importance is None else importance.repeat(len(rows), 1).T.contiguous()
                scales = _first_scales(columns, tensor_scale)
                if search:
                    scales = _best_scales(columns, scales, tensor_scale, factors)
                total = tensor_scale * e4m3_values(scales)
                codes = _codes(columns / torch.where(total > 0, total, 1)).masked_fill_(total == 0, 0)
                codes = codes.T.reshape(len(rows), -1)
            return pack_nibbles(codes, high_first=True), scales.view(len(rows), -1)

        elements = 0 if rounding is None else ROUNDED_ELEMENTS
        codes, scales = by_rows(encode, weight, columns=n_columns, elements=elements)
        below = (0, 0, 0, all_rows - n_rows)
        return {
            "weight": pad(codes, below),
            "weight_scale": to_tiles(pad(scales, below)).view(torch.float8_e4m3fn),
            "weight_scale_2": tensor_scale,
        }


def nearest_e2m1(values: Tensor) -> Tensor:
    """Return the four-bit floats nearest to values, float32 of any shape."""
    return _rounded(values.abs()).copysign_(values)


def _first_scales(columns: Tensor, tensor_scale: Tensor) -> Tensor:
    """Return the codes of kitchen's scales, which map the largest magnitude of a block to 6: uint8, (blocks,)."""
    scales = columns.abs().amax(0) / TOP / tensor_scale
    return scales.clamp_(max=_MAX_SCALE).to(torch.float8_e4m3fn).view(torch.uint8)


def _best_scales(columns: Tensor, first: Tensor, tensor_scale: Tensor, factors: Tensor | None) -> Tensor:
    """Return the codes of the scales near `first` with the least error, weighted by factors: uint8, (blocks,)."""
    best, least = first, _error(columns, tensor_scale * e4m3_values(first), factors)
    for step in _STEPS:
        scales = (first.int() + step).clamp_(1, MAX_E4M3_CODE).to(torch.uint8)
        error = _error(columns, tensor_scale * e4m3_values(scales), factors)
        better = error < least
        best, least = torch.where(better, scales, best), torch.where(better, error, least)
    return best


def _error(columns: Tensor, total: Tensor, factors: Tensor | None) -> Tensor:
    """Return the root of the sum of squared errors of each block: float32, (blocks,).

    Errors in steps of the scale neither overflow nor vanish, however large the weights are.
    """
    safe = torch.where(total > 0, total, 1)
    scaled = columns.abs().div_(safe)
    # A block whose scale is 0 decodes to zeros.
    squares = _rounded(scaled).mul_((total > 0).float()).sub_(scaled).square_()
    if factors is not None:
        squares.mul_(factors)
    return squares.sum(0).sqrt_().mul_(safe)


def _rounded(magnitudes: Tensor) -> Tensor:
    """Round magnitudes, float32 of any shape, to the nearest of `_VALUES`, and ties to the even code."""
    magnitudes = magnitudes.clamp(max=TOP)
    # Values are half of a power of two apart: of the one below the magnitude, or of 1 for the smallest.
    steps = (magnitudes.view(torch.int32) & _EXPONENT_BITS).view(torch.float32).clamp_(min=1).mul_(0.5)
    return magnitudes.div_(steps).round_().mul_(steps)


def _codes(scaled: Tensor) -> Tensor:
    """Return the code of each scaled weight: uint8, the sign in bit 3."""
    halves = _rounded(scaled.abs()).mul_(2)
    # Twice the values are 0 to 4, 6, 8 and 12.
    codes = halves - (halves > 4).float() - (halves > 6).float() - 3 * (halves > 8).float()
    return codes.to(torch.uint8) | scaled.signbit().to(torch.uint8) << 3


@cached_on_device
def _table(device: torch.device) -> Tensor:
    return torch.tensor([*_VALUES, *(-value for value in _VALUES)], device=device)
