"""Formats that are dequantized by comfy-kitchen, a package of ComfyUI: NVFP4, MXFP8 and 4-bit ConvRot."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from .scaled import FoldedTensor, Layer, expect, numbers, rotation_group, single_number
from .tensors import SourceTensor

# Block scales are stored in tiles of 128 rows and 4 blocks, the layout of cuBLAS.
_TILE_ROWS, _TILE_BLOCKS = 128, 4
_BLOCK_ELEMENTS = {"nvfp4": 16, "mxfp8": 32}
_SCALE_DTYPES = {"nvfp4": ("F8_E4M3", "U8"), "mxfp8": ("F8_E8M0", "U8")}


@dataclass(frozen=True)
class BlockScaledTensor(FoldedTensor):
    """A weight in NVFP4 or MXFP8."""

    def _rows(self, first: int, last: int) -> Tensor:
        start = first // _TILE_ROWS * _TILE_ROWS
        scales = self._scales(start, last)
        codes = self.layer.weight_rows(start, last)
        kitchen = _kitchen(self.layer)
        if self.layer.tensor_scale is None:
            rows: Tensor = kitchen.dequantize_mxfp8(codes.view(torch.float8_e4m3fn), scales, torch.float32)
        else:
            rows = kitchen.dequantize_nvfp4(codes, numbers(self.layer.tensor_scale).view(()), scales, torch.float32)
        return rows[first - start :]

    def _scales(self, start: int, last: int) -> Tensor:
        row_bytes = _padded_blocks(self.layer, self.shape[1])
        stop = min(-(-last // _TILE_ROWS) * _TILE_ROWS * row_bytes, self.layer.scale.nbytes)
        dtype = torch.float8_e8m0fnu if self.layer.tensor_scale is None else torch.float8_e4m3fn
        return self.layer.scale.peek(start * row_bytes, stop).view(dtype).view(-1, row_bytes)


@dataclass(frozen=True)
class RotatedInt4Tensor(FoldedTensor):
    """A weight of signed 4-bit integers that was rotated by ConvRot."""

    group: int

    def _rows(self, first: int, last: int) -> Tensor:
        scales = self.layer.scale.peek(first * 4, last * 4).view(torch.float32)
        codes = self.layer.weight_rows(first, last).view(torch.int8)
        dequantize = _kitchen(self.layer).tensor.convrot_w4a4.dequantize_convrot_w4a4_weight
        rows: Tensor = dequantize(codes, scales, convrot_groupsize=self.group, output_dtype=torch.float32)
        return rows


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
    if in_features % _BLOCK_ELEMENTS[name]:
        raise layer.error(
            f"{in_features} input channels in format {name}, expected a multiple of {_BLOCK_ELEMENTS[name]};"
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
    _kitchen(layer)
    return BlockScaledTensor(layer.weight.name, torch.float32, (layer.rows, in_features), name.upper(), layer)


def fold_int4(layer: Layer) -> SourceTensor:
    """Return the weight of a layer in the format `convrot_w4a4`, which has one float32 scale per row."""
    expect(layer, "I8", "U8")
    in_features = 2 * layer.row_bytes
    if layer.scale.dtype != "F32" or layer.scale.nbytes != 4 * layer.rows:
        raise layer.error(
            f"its scale is {layer.scale.dtype} of shape {layer.scale.shape}, expected {layer.rows} F32 numbers;"
            " the file is damaged, download it again"
        )
    _kitchen(layer)
    group = rotation_group(layer, in_features)
    return RotatedInt4Tensor(layer.weight.name, torch.float32, (layer.rows, in_features), "I4 rotated", layer, group)


def _padded_blocks(layer: Layer, in_features: int) -> int:
    """Return the number of block scales per row, including padding to whole tiles."""
    blocks = in_features // _BLOCK_ELEMENTS[str(layer.config["format"])]
    return -(-blocks // _TILE_BLOCKS) * _TILE_BLOCKS


def _kitchen(layer: Layer) -> ModuleType:
    try:
        return importlib.import_module("comfy_kitchen")
    except ImportError as error:
        raise layer.error(
            f"{layer.config['format']} is dequantized by the package comfy-kitchen, which is not installed here;"
            " run the conversion with ComfyUI's Python"
        ) from error
