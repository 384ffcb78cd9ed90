"""Weights in ComfyUI's quantized formats, which store scales in other tensors.

A "folded" tensor is such a weight with its scales multiplied in; it is dequantized a few rows at a time.

Source: comfy/utils.py convert_old_quants, comfy/ops.py _load_quantized_module, ComfyUI 0.30.0; for the values,
comfy_kitchen 0.2.26 backends/eager/quantization.py.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import QuantError
from ..native.packing import unpack_signed_nibbles
from ..native.rotation import hadamard
from .tensors import DTYPES, SourceTensor, StoredTensor

# The matrix of a rotation has as many rows and columns; published files have 256.
_MAX_ROTATION = 1 << 12
_NUMBERS = DTYPES | {"I8": torch.int8}


@dataclass(frozen=True)
class Layer:
    """A quantized layer: its stored tensors and the description of its format."""

    weight: StoredTensor
    config: dict[str, object]
    """The JSON object of `<layer>.comfy_quant`, with the key `format`."""
    scale: StoredTensor
    tensor_scale: StoredTensor | None = None
    """The scale of the block scales, in NVFP4 only."""
    input_factor: StoredTensor | None = None
    """`pre_quant_scale`, (in_features,): the factors that the inputs are multiplied by first."""
    parts: Mapping[str, StoredTensor] = field(default_factory=dict)
    """Further tensors of formats with several scales, by what follows the name of the layer."""

    @property
    def rows(self) -> int:
        return self.weight.shape[0]

    @property
    def row_bytes(self) -> int:
        return self.weight.nbytes // self.rows

    def weight_rows(self, first: int, last: int) -> Tensor:
        """Return the rows `first` to `last`: uint8, (last - first, row_bytes)."""
        return self.weight.read(first * self.row_bytes, last * self.row_bytes).view(-1, self.row_bytes)

    def number(self, key: str, default: int) -> int:
        """Return a positive integer of the configuration.

        Raises:
            QuantError: another value.
        """
        value = self.option(key, default)
        if type(value) is not int or value < 1:
            raise self.error(
                f"{key} is {str(value)[:40]!r}, expected a positive integer; the file is damaged, download it again"
            )
        return value

    def option(self, key: str, default: object) -> object:
        """Return a value of the configuration, from its top level or from `params`."""
        params = self.config.get("params")
        return self.config.get(key, params.get(key, default) if isinstance(params, dict) else default)

    def error(self, problem: str) -> QuantError:
        """Return an error that names the file and the weight."""
        return QuantError(f"{self.weight.file.path}: tensor {self.weight.name}: {problem}")


@dataclass(frozen=True)
class FoldedTensor(SourceTensor):
    """A weight in float32 with its scales multiplied in; reading a slice needs the memory of its rows."""

    layer: Layer

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        stop = self._stop(stop)
        row_elements = math.prod(self.shape[1:])
        first, last = start // row_elements, -(-stop // row_elements)
        rows = self._rows(first, last)
        if self.layer.input_factor is not None:
            rows = rows * numbers(self.layer.input_factor).view(1, -1)
        return rows.flatten()[start - first * row_elements : stop - first * row_elements]

    @abstractmethod
    def _rows(self, first: int, last: int) -> Tensor:
        """Return the rows `first` to `last` along the first dimension: float32, (last - first, elements per row)."""


@dataclass(frozen=True)
class ScaledTensor(FoldedTensor):
    """A weight of FP8, INT8 or wider numbers with one scale for the tensor or one per row."""

    def _rows(self, first: int, last: int) -> Tensor:
        return self._codes(first, last).float() * self._scales(first, last)

    def _codes(self, first: int, last: int) -> Tensor:
        return self.layer.weight_rows(first, last).view(_NUMBERS[self.layer.weight.dtype])

    def _scales(self, first: int, last: int) -> Tensor:
        scale = self.layer.scale
        dtype = DTYPES[scale.dtype]
        if scale.nbytes == dtype.itemsize:
            return numbers(scale)
        return scale.peek(first * dtype.itemsize, last * dtype.itemsize).view(dtype).float().view(-1, 1)


@dataclass(frozen=True)
class RotatedTensor(ScaledTensor):
    """A weight of integers in which ConvRot rotated each group of input channels by an orthogonal matrix.

    Reading it undoes the rotation.
    """

    group: int

    def _rows(self, first: int, last: int) -> Tensor:
        rows = super()._rows(first, last)
        return (rows.view(-1, self.group) @ hadamard(self.group)).view_as(rows)


@dataclass(frozen=True)
class RotatedInt4Tensor(RotatedTensor):
    """A rotated weight of signed 4-bit integers, two in a byte."""

    def _codes(self, first: int, last: int) -> Tensor:
        return unpack_signed_nibbles(self.layer.weight_rows(first, last))


def numbers(stored: StoredTensor) -> Tensor:
    """Return all values of a small tensor: float32, flat."""
    return stored.peek().view(DTYPES[stored.dtype]).float()


def fold_floats(layer: Layer) -> SourceTensor:
    """Return the weight of a layer in FP8, or in wider numbers that have a scale all the same."""
    if layer.weight.dtype not in DTYPES:
        raise layer.error(
            f"{layer.weight.dtype} in format {layer.config['format']}, expected {', '.join(DTYPES)};"
            " the file is damaged, download it again"
        )
    return _scaled(layer)


def fold_int8(layer: Layer) -> SourceTensor:
    """Return the weight of a layer in INT8 with one scale or one per row, rotated by ConvRot or not."""
    expect(layer, "I8")
    if not layer.option("convrot", False):
        return _scaled(layer)
    _check_scale(layer)
    group = rotation_group(layer, layer.weight.shape[-1])
    return RotatedTensor(layer.weight.name, torch.float32, layer.weight.shape, "I8 rotated", layer, group)


def fold_int4(layer: Layer) -> SourceTensor:
    """Return the weight of a layer in the format `convrot_w4a4`, which has one float32 scale per row."""
    expect(layer, "I8", "U8")
    if layer.scale.dtype != "F32" or layer.scale.nbytes != 4 * layer.rows:
        raise layer.error(
            f"its scale is {layer.scale.dtype} of shape {layer.scale.shape}, expected {layer.rows} F32 numbers;"
            " the file is damaged, download it again"
        )
    shape = layer.rows, 2 * layer.row_bytes
    group = rotation_group(layer, shape[1])
    return RotatedInt4Tensor(layer.weight.name, torch.float32, shape, "I4 rotated", layer, group)


def rotation_group(layer: Layer, in_features: int) -> int:
    """Return the number of input channels per rotation of ConvRot.

    Raises:
        QuantError: not a power of 4 that divides `in_features`, or far above those of real files.
    """
    group = layer.number("convrot_groupsize", 256)
    is_power_of_4 = group & (group - 1) == 0 and group.bit_length() % 2 == 1
    if not 4 <= group <= _MAX_ROTATION or in_features % group or not is_power_of_4:
        raise layer.error(
            f"convrot_groupsize is {group}, expected a power of 4 that divides the {in_features} input channels, up to"
            f" {_MAX_ROTATION}; the file is damaged, download it again"
        )
    return group


def _scaled(layer: Layer) -> ScaledTensor:
    _check_scale(layer)
    stored = f"{layer.weight.dtype} scaled"
    return ScaledTensor(layer.weight.name, torch.float32, layer.weight.shape, stored, layer)


def expect(layer: Layer, *dtypes: str) -> None:
    """Refuse a weight that is not a matrix of one of these dtypes."""
    if layer.weight.dtype not in dtypes or len(layer.weight.shape) != 2:
        got = f"{layer.weight.dtype} of shape {layer.weight.shape}"
        raise layer.error(
            f"{got} in format {layer.config['format']}, expected {' or '.join(dtypes)} and 2 dimensions;"
            " the file is damaged, download it again"
        )


def single_number(layer: Layer, part: StoredTensor) -> None:
    """Refuse a part of a layer that is not one floating point number."""
    if part.dtype not in DTYPES or part.nbytes != DTYPES[part.dtype].itemsize:
        raise layer.error(
            f"{part.name.rpartition('.')[2]} is {part.dtype} of shape {part.shape}, expected one number of"
            f" {', '.join(DTYPES)}; the file is damaged, download it again"
        )


def _check_scale(layer: Layer) -> None:
    scale, shape = layer.scale, layer.weight.shape
    single = scale.shape in ((), (1,), (1, 1))
    if scale.dtype not in DTYPES or not (single or (len(shape) == 2 and scale.shape in ((shape[0], 1), shape[:1]))):
        raise layer.error(
            f"its scale is {scale.dtype} of shape {scale.shape}, expected one number or {(*shape[:1], 1)};"
            " use the full-precision checkpoint"
        )
