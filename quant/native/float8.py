"""FP8 with one scale, and MXFP8 with a power of two as the scale of 32 weights.

A floating-point grid is alike at every scale, so neither gains from a search.

Source: comfy_kitchen 0.2.40 backends/eager/quantization.py, whose bytes these are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from .native_format import TINY, NativeFormat, Part, by_rows, largest
from .packing import from_tiles, tiled_shape, to_tiles
from .rotation import Rotation, rotate_as_kitchen

_MAX = 448.0
_BLOCK = 32
_BIAS = 127
_MAX_EXPONENT = 254


class FP8(NativeFormat):
    """E4M3 floats with one scale."""

    def decode(
        self, parts: Mapping[str, Tensor], shape: tuple[int, ...] | None = None, undo: Rotation = rotate_as_kitchen
    ) -> Tensor:
        return parts["weight"].float().mul_(parts["weight_scale"])

    def _tensors(self, rows: int, columns: int) -> tuple[Part, ...]:
        return Part("weight", "F8_E4M3", (rows, columns)), Part("weight_scale", "F32", ())

    def _encode(self, weight: Tensor, importance: Tensor | None, search: bool) -> dict[str, Tensor]:
        scale = scale_of(largest(weight), _MAX)

        def codes(rows: Tensor) -> tuple[Tensor, ...]:
            return ((rows.float() * (1 / scale)).clamp_(-_MAX, _MAX).to(torch.float8_e4m3fn),)

        return {"weight": by_rows(codes, weight, columns=weight.shape[1])[0], "weight_scale": scale}


class MXFP8(NativeFormat):
    """E4M3 floats, 32 of which share a power of two."""

    def decode(
        self, parts: Mapping[str, Tensor], shape: tuple[int, ...] | None = None, undo: Rotation = rotate_as_kitchen
    ) -> Tensor:
        weight = parts["weight"]
        rows, columns = weight.shape
        exponents = from_tiles(parts["weight_scale"], rows, columns // _BLOCK)

        def values(codes: Tensor, exponents: Tensor) -> tuple[Tensor, ...]:
            scaled = codes.float().view(len(codes), -1, _BLOCK) * _power(exponents).unsqueeze(-1)
            return (scaled.flatten(1),)

        return cropped(by_rows(values, weight, exponents, columns=columns)[0], shape)

    def _tensors(self, rows: int, columns: int) -> tuple[Part, ...]:
        rows, columns = padded(rows, columns, _BLOCK)
        scales = tiled_shape(rows, columns // _BLOCK)
        return Part("weight", "F8_E4M3", (rows, columns)), Part("weight_scale", "U8", scales)

    def _encode(self, weight: Tensor, importance: Tensor | None, search: bool) -> dict[str, Tensor]:
        n_rows, n_columns = weight.shape
        all_rows, all_columns = padded(n_rows, n_columns, _BLOCK)

        def blocks(rows: Tensor) -> tuple[Tensor, ...]:
            values = pad(rows.float(), (0, all_columns - n_columns)).view(len(rows), -1, _BLOCK)
            amax = values.abs().amax(-1)
            exponents = (amax / _MAX).clamp_(min=2.0**-_BIAS).log2_().ceil_() + _BIAS
            # Exponent 0 is 0 to kitchen and 2^-127 to the standard. Only blocks of zeros have it.
            exponents = torch.where(amax > 0, exponents.clamp_(1, _MAX_EXPONENT), 0).to(torch.uint8)
            scales = torch.where(amax > 0, _power(exponents), 1).unsqueeze(-1)
            codes = (values / scales).clamp_(-_MAX, _MAX).to(torch.float8_e4m3fn)
            return codes.flatten(1), exponents

        codes, exponents = by_rows(blocks, weight, columns=n_columns)
        below = (0, 0, 0, all_rows - n_rows)
        weight_codes = pad(codes.view(torch.uint8), below).view(torch.float8_e4m3fn)
        return {"weight": weight_codes, "weight_scale": to_tiles(pad(exponents, below))}


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
