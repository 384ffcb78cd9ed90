"""FP8 with one scale, and MXFP8 with a power of two as the scale of 32 weights.

A floating-point grid is alike at every scale, so neither gains from a search.

Source: comfy_kitchen 0.2.40 backends/eager/quantization.py, whose bytes these are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from .native_format import ROUNDED_ELEMENTS, TINY, NativeFormat, Part, Rounding, by_rows, largest
from .packing import from_tiles, tiled_shape, to_tiles
from .rotation import Rotation, rotate_as_kitchen

TOP = 448.0
MAX_E4M3_CODE = 0x7E
BLOCK = 32
_BIAS = 127
_MAX_EXPONENT = 254
LEAST_POWER = 2.0**-26
"""The least scale of MXFP8 that a rounding may choose, relative to about the largest weight."""
_LEAST_UNIT = 2.0**-100


class FP8(NativeFormat):
    """E4M3 floats with one scale."""

    def decode(
        self, parts: Mapping[str, Tensor], shape: tuple[int, ...] | None = None, undo: Rotation = rotate_as_kitchen
    ) -> Tensor:
        return parts["weight"].float().mul_(parts["weight_scale"])

    def _tensors(self, rows: int, columns: int) -> tuple[Part, ...]:
        return Part("weight", "F8_E4M3", (rows, columns)), Part("weight_scale", "F32", ())

    def _encode(
        self, weight: Tensor, importance: Tensor | None, search: bool, rounding: Rounding | None
    ) -> dict[str, Tensor]:
        scale = scale_of(largest(weight), TOP)

        def codes(rows: Tensor) -> tuple[Tensor, ...]:
            levels = rows.float() * (1 / scale)
            if rounding is not None:
                levels = rounding(self, levels)[0]
            return (nearest_e4m3(levels),)

        elements = 0 if rounding is None else ROUNDED_ELEMENTS
        weights = by_rows(codes, weight, columns=weight.shape[1], elements=elements)[0]
        return {"weight": weights, "weight_scale": scale}


class MXFP8(NativeFormat):
    """E4M3 floats, 32 of which share a power of two."""

    multiple = BLOCK

    def decode(
        self, parts: Mapping[str, Tensor], shape: tuple[int, ...] | None = None, undo: Rotation = rotate_as_kitchen
    ) -> Tensor:
        weight = parts["weight"]
        rows, columns = weight.shape
        exponents = from_tiles(parts["weight_scale"], rows, columns // BLOCK)

        def values(codes: Tensor, exponents: Tensor) -> tuple[Tensor, ...]:
            scaled = codes.float().view(len(codes), -1, BLOCK) * _power(exponents).unsqueeze(-1)
            return (scaled.flatten(1),)

        return cropped(by_rows(values, weight, exponents, columns=columns)[0], shape)

    def _tensors(self, rows: int, columns: int) -> tuple[Part, ...]:
        rows, columns = padded(rows, columns, BLOCK)
        scales = tiled_shape(rows, columns // BLOCK)
        return Part("weight", "F8_E4M3", (rows, columns)), Part("weight_scale", "U8", scales)

    def _encode(
        self, weight: Tensor, importance: Tensor | None, search: bool, rounding: Rounding | None
    ) -> dict[str, Tensor]:
        n_rows, n_columns = weight.shape
        all_rows, all_columns = padded(n_rows, n_columns, BLOCK)
        # A power of two brings the weight near 1, as the rounding needs it.
        unit = power_near(largest(weight)).clamp(min=_LEAST_UNIT)

        def blocks(rows: Tensor) -> tuple[Tensor, ...]:
            values = pad(rows.float(), (0, all_columns - n_columns))
            if rounding is None:
                scales = block_scales(values.view(len(rows), -1, BLOCK).abs().amax(-1))
                levels = values.view(len(rows), -1, BLOCK) / torch.where(scales > 0, scales, 1).unsqueeze(-1)
            else:
                levels, scales, _ = rounding(self, values / unit)
                scales = torch.where(scales > 0, scales * unit, 0)
            return nearest_e4m3(levels.view(len(rows), -1)), _exponents(scales)

        elements = 0 if rounding is None else ROUNDED_ELEMENTS
        codes, exponents = by_rows(blocks, weight, columns=n_columns, elements=elements)
        below = (0, 0, 0, all_rows - n_rows)
        weight_codes = pad(codes.view(torch.uint8), below).view(torch.float8_e4m3fn)
        return {"weight": weight_codes, "weight_scale": to_tiles(pad(exponents, below))}


def block_scales(amax: Tensor) -> Tensor:
    """Return the power of two for blocks with this largest magnitude, 0 for zeros: float32, of the same shape.

    Exponent 0 is 0 to kitchen and 2^-127 to the standard. Only blocks of zeros have it.
    """
    exponents = (amax / TOP).clamp_(min=2.0**-_BIAS).log2_().ceil_() + _BIAS
    return torch.where(amax > 0, _power(exponents.clamp_(1, _MAX_EXPONENT)), 0.0)


def nearest_e4m3(values: Tensor) -> Tensor:
    """Return the E4M3 floats nearest to values, float32 of any shape."""
    return values.clamp(-TOP, TOP).to(torch.float8_e4m3fn)


def e4m3_values(codes: Tensor) -> Tensor:
    """Return the float32 values of E4M3 codes, uint8 of any shape."""
    return codes.view(torch.float8_e4m3fn).float()


def power_near(amax: Tensor) -> Tensor:
    """Return a power of two near each largest magnitude, float32 of the same shape; 1 for zeros."""
    exponents = torch.frexp(amax).exponent.clamp(-126, 127)
    return torch.where(amax > 0, _power(exponents + _BIAS), 1.0)


def scale_of(amax: Tensor, top: float) -> Tensor:
    """Return the scale, float32 of any shape, at which the largest magnitude has the code `top`; 1 for zeros."""
    return torch.where(amax > 0, (amax / top).clamp(min=TINY), 1.0)


def padded(rows: int, columns: int, multiple: int) -> tuple[int, int]:
    """Return a shape whose sides are the next multiples of a number."""
    return -(-rows // multiple) * multiple, -(-columns // multiple) * multiple


def cropped(weight: Tensor, shape: tuple[int, ...] | None) -> Tensor:
    """Return a float32 weight, (rows, columns), without its padding, where its shape is known."""
    return weight if shape is None else weight[: shape[0], : shape[1]].contiguous()


def _power(exponents: Tensor) -> Tensor:
    return (exponents.int() << 23).view(torch.float32)


def _exponents(powers: Tensor) -> Tensor:
    """Undo `_power`: uint8, of the same shape."""
    return (powers.view(torch.int32) >> 23).to(torch.uint8)
