"""Formats that comfy-kitchen, which comes with ComfyUI, decodes: NVFP4, MXFP8 and the 4-bit ConvRot."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from .scaled import FoldedTensor, Layer, expect, numbers, rotation_group
from .tensors import SourceTensor

# Block scales lie in tiles of 128 rows and 4 blocks, as cuBLAS wants them.
_TILE_ROWS, _TILE_BLOCKS = 128, 4
_CODES_OF_BLOCK = {"nvfp4": 16, "mxfp8": 32}


@dataclass(frozen=True)
class BlockScaledTensor(FoldedTensor):
    """NVFP4 or MXFP8."""

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
    """Signed 4-bit rows, rotated by ConvRot."""

    group: int

    def _rows(self, first: int, last: int) -> Tensor:
        scales = self.layer.scale.peek(first * 4, last * 4).view(torch.float32)
        codes = self.layer.weight_rows(first, last).view(torch.int8)
        decode = _kitchen(self.layer).tensor.convrot_w4a4.dequantize_convrot_w4a4_weight
        rows: Tensor = decode(codes, scales, convrot_groupsize=self.group, output_dtype=torch.float32)
        return rows


def fold_blocks(layer: Layer) -> SourceTensor:
    """NVFP4 (two codes a byte, FP8 scale for 16, one scale for all) and MXFP8 (power-of-two scale for 32)."""
    name = str(layer.config["format"])
    expect(layer, *(("U8",) if name == "nvfp4" else ("F8_E4M3",)))
    columns = layer.row_bytes * (2 if name == "nvfp4" else 1)
    if (layer.tensor_scale is None) != (name == "mxfp8"):
        raise layer.error(f"in format {name} but weight_scale_2 is {'missing' if name == 'nvfp4' else 'given'}")
    if columns % _CODES_OF_BLOCK[name]:
        raise layer.error(f"{columns} columns in format {name}, expected a multiple of {_CODES_OF_BLOCK[name]}")
    expected = -(-layer.rows // _TILE_ROWS) * _TILE_ROWS * _padded_blocks(layer, columns)
    if layer.scale.nbytes != expected:
        raise layer.error(f"{layer.scale.nbytes} bytes of block scales, expected {expected}; the file is damaged")
    _kitchen(layer)
    return BlockScaledTensor(layer.weight.name, torch.float32, (layer.rows, columns), name.upper(), layer)


def fold_int4(layer: Layer) -> SourceTensor:
    """`convrot_w4a4`: one float32 scale for each row."""
    expect(layer, "I8", "U8")
    columns = 2 * layer.row_bytes
    if layer.scale.dtype != "F32" or layer.scale.nbytes != 4 * layer.rows:
        raise layer.error(f"scale of shape {layer.scale.shape}, expected {layer.rows} numbers; the file is damaged")
    _kitchen(layer)
    group = rotation_group(layer, columns)
    return RotatedInt4Tensor(layer.weight.name, torch.float32, (layer.rows, columns), "I4 rotated", layer, group)


def _padded_blocks(layer: Layer, columns: int) -> int:
    blocks = columns // _CODES_OF_BLOCK[str(layer.config["format"])]
    return -(-blocks // _TILE_BLOCKS) * _TILE_BLOCKS


def _kitchen(layer: Layer) -> ModuleType:
    try:
        return importlib.import_module("comfy_kitchen")
    except ImportError as error:
        raise layer.error(
            f"{layer.config['format']} is decoded by the package comfy-kitchen, which is not installed here;"
            " run the conversion with ComfyUI's Python"
        ) from error
