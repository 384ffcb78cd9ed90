"""Weights in NVFP4 and MXFP8, whose blocks of input channels have scales in the order that cuBLAS reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..native.native_format import NativeFormat
from ..native.registry import NATIVE
from .scaled import FoldedTensor, Layer, expect, numbers, single_number
from .tensors import SourceTensor

# Block scales are stored in tiles of 128 rows and 4 blocks, the layout of cuBLAS.
_TILE_ROWS, _TILE_BLOCKS = 128, 4
_SCALE_DTYPES = {"nvfp4": ("F8_E4M3", "U8"), "mxfp8": ("F8_E8M0", "U8")}


@dataclass(frozen=True)
class BlockScaledTensor(FoldedTensor):
    """A weight in NVFP4 or MXFP8."""

    def _rows(self, first: int, last: int) -> Tensor:
        start = first // _TILE_ROWS * _TILE_ROWS
        parts = {"weight": self.layer.weight_rows(start, last), "weight_scale": self._scales(start, last)}
        if self.layer.tensor_scale is None:
            parts["weight"] = parts["weight"].view(torch.float8_e4m3fn)
        else:
            parts["weight_scale_2"] = numbers(self.layer.tensor_scale).view(())
        return _native(self.layer).decode(parts)[first - start :]

    def _scales(self, start: int, last: int) -> Tensor:
        row_bytes = _padded_blocks(self.layer, self.shape[1])
        stop = min(-(-last // _TILE_ROWS) * _TILE_ROWS * row_bytes, self.layer.scale.nbytes)
        return self.layer.scale.peek(start * row_bytes, stop).view(-1, row_bytes)


def fold_blocks(layer: Layer) -> SourceTensor:
    """Return the weight of a layer in NVFP4 or MXFP8.

    NVFP4 has two codes per byte, an FP8 scale per 16 elements and one scale for the tensor. MXFP8 has a power of two as
    the scale of 32 elements.
    """
    name = str(layer.config["format"])
    expect(layer, *(("U8",) if name == "nvfp4" else ("F8_E4M3",)))
    in_features = layer.row_bytes * (2 if name == "nvfp4" else 1)
    if (layer.tensor_scale is None) != (name == "mxfp8"):
        got, expected = ("no", "one") if name == "nvfp4" else ("a", "none")
        raise layer.error(
            f"has {got} weight_scale_2, expected {expected} in format {name}; the file is damaged, download it again"
        )
    if in_features % _native(layer).multiple:
        raise layer.error(
            f"{in_features} input channels in format {name}, expected a multiple of {_native(layer).multiple};"
            " the file is damaged, download it again"
        )
    n_bytes = -(-layer.rows // _TILE_ROWS) * _TILE_ROWS * _padded_blocks(layer, in_features)
    if layer.scale.nbytes != n_bytes or layer.scale.dtype not in _SCALE_DTYPES[name]:
        raise layer.error(
            f"{layer.scale.nbytes} bytes of block scales of {layer.scale.dtype}, expected {n_bytes} of"
            f" {' or '.join(_SCALE_DTYPES[name])}; the file is damaged, download it again"
        )
    if layer.tensor_scale is not None:
        single_number(layer, layer.tensor_scale)
    return BlockScaledTensor(layer.weight.name, torch.float32, (layer.rows, in_features), name.upper(), layer)


def _padded_blocks(layer: Layer, in_features: int) -> int:
    """Return the number of block scales per row, including padding to whole tiles."""
    blocks = in_features // _native(layer).multiple
    return -(-blocks // _TILE_BLOCKS) * _TILE_BLOCKS


def _native(layer: Layer) -> NativeFormat:
    return NATIVE[str(layer.config["format"]).upper()]
