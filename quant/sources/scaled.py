"""Weights that a file stores with scales beside them, as ComfyUI does: the scales are folded in, rows at a time.

Source: comfy/utils.py convert_old_quants, comfy/ops.py _load_quantized_module, ComfyUI 0.30.0; values:
comfy_kitchen 0.2.26 backends/eager/quantization.py.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import QuantError
from .tensors import DTYPES, SourceTensor, StoredTensor

_NUMBERS = DTYPES | {"I8": torch.int8}


@dataclass(frozen=True)
class Layer:
    """The stored parts of one weight."""

    weight: StoredTensor
    config: dict[str, object]
    """The JSON of `<layer>.comfy_quant`; has `format`."""
    scale: StoredTensor
    tensor_scale: StoredTensor | None = None
    """NVFP4 only: the scale of the block scales."""
    input_factor: StoredTensor | None = None
    """(columns,): inputs are multiplied by it first (`pre_quant_scale`)."""

    @property
    def rows(self) -> int:
        return self.weight.shape[0]

    @property
    def row_bytes(self) -> int:
        return self.weight.nbytes // self.rows

    def weight_rows(self, first: int, last: int) -> Tensor:
        """uint8 (rows, row_bytes)."""
        return self.weight.read(first * self.row_bytes, last * self.row_bytes).view(-1, self.row_bytes)

    def number(self, key: str, default: int) -> int:
        """An integer of the configuration, at its top or under `params`."""
        value = self.option(key, default)
        if type(value) is not int or value < 1:
            raise self.error(f"{key} is {str(value)[:40]!r}, expected a positive integer; the file is damaged")
        return value

    def option(self, key: str, default: object) -> object:
        params = self.config.get("params")
        return self.config.get(key, params.get(key, default) if isinstance(params, dict) else default)

    def error(self, problem: str) -> QuantError:
        return QuantError(f"{self.weight.file.path}: tensor {self.weight.name}: {problem}")


@dataclass(frozen=True)
class FoldedTensor(SourceTensor):
    """A weight in float32 with its scales multiplied in; any slice costs the memory of its rows."""

    layer: Layer

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        stop = self._stop(stop)
        columns = math.prod(self.shape[1:])
        first, last = start // columns, -(-stop // columns)
        rows = self._rows(first, last)
        if self.layer.input_factor is not None:
            rows = rows * numbers(self.layer.input_factor).view(1, -1)
        return rows.flatten()[start - first * columns : stop - first * columns]

    @abstractmethod
    def _rows(self, first: int, last: int) -> Tensor:
        """Float32 (last - first, columns); a row is what has one index in the first dimension."""


@dataclass(frozen=True)
class ScaledTensor(FoldedTensor):
    """FP8 or INT8 numbers times one scale for the tensor or one for each row."""

    def _rows(self, first: int, last: int) -> Tensor:
        codes = self.layer.weight_rows(first, last).view(_NUMBERS[self.layer.weight.dtype])
        return codes.float() * self._scales(first, last)

    def _scales(self, first: int, last: int) -> Tensor:
        scale = self.layer.scale
        dtype = DTYPES[scale.dtype]
        if scale.nbytes == dtype.itemsize:
            return numbers(scale)
        return scale.peek(first * dtype.itemsize, last * dtype.itemsize).view(dtype).float().view(-1, 1)


@dataclass(frozen=True)
class RotatedTensor(ScaledTensor):
    """INT8 whose groups of columns were rotated by an orthogonal matrix (ConvRot), which is undone."""

    group: int

    def _rows(self, first: int, last: int) -> Tensor:
        rows = super()._rows(first, last)
        return (rows.view(-1, self.group) @ hadamard(self.group)).view_as(rows)


def hadamard(size: int) -> Tensor:
    """Float32 (size, size): the symmetric, orthogonal matrix of ConvRot, its own inverse; `size` is a power of 4."""
    seed = 1 - 2 * torch.eye(4).flip(0)
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, seed)
    return matrix.div_(size**0.5)


def numbers(stored: StoredTensor) -> Tensor:
    """All values of a small tensor in float32, flat."""
    return stored.peek().view(DTYPES[stored.dtype]).float()


def fold_floats(layer: Layer) -> SourceTensor:
    """FP8, or wider numbers that have a scale all the same."""
    if layer.weight.dtype not in DTYPES:
        raise layer.error(f"{layer.weight.dtype} in format {layer.config['format']}, expected {', '.join(DTYPES)}")
    return _scaled(layer)


def fold_int8(layer: Layer) -> SourceTensor:
    """INT8 with one scale or one for each row, rotated or not."""
    expect(layer, "I8")
    if not layer.option("convrot", False):
        return _scaled(layer)
    _check_scale(layer)
    group = rotation_group(layer, layer.weight.shape[-1])
    return RotatedTensor(layer.weight.name, torch.float32, layer.weight.shape, "I8 rotated", layer, group)


def rotation_group(layer: Layer, columns: int) -> int:
    """The number of columns that ConvRot mixed."""
    group = layer.number("convrot_groupsize", 256)
    if group < 4 or columns % group or group & (group - 1) or group.bit_length() % 2 == 0:
        raise layer.error(f"convrot_groupsize is {group}, expected a power of 4 that divides {columns} columns")
    return group


def _scaled(layer: Layer) -> ScaledTensor:
    _check_scale(layer)
    stored = f"{layer.weight.dtype} scaled"
    return ScaledTensor(layer.weight.name, torch.float32, layer.weight.shape, stored, layer)


def expect(layer: Layer, *dtypes: str) -> None:
    """Refuses a weight that its format cannot have."""
    if layer.weight.dtype not in dtypes or len(layer.weight.shape) != 2:
        got = f"{layer.weight.dtype} of shape {layer.weight.shape}"
        raise layer.error(f"{got} in format {layer.config['format']}, expected {' or '.join(dtypes)} and 2 dimensions")


def _check_scale(layer: Layer) -> None:
    scale, shape = layer.scale, layer.weight.shape
    single = scale.shape in ((), (1,), (1, 1))
    if scale.dtype not in DTYPES or not (single or (len(shape) == 2 and scale.shape == (layer.rows, 1))):
        raise layer.error(
            f"its scale is {scale.dtype} of shape {scale.shape}, expected one number or {(*shape[:1], 1)};"
            " use the full-precision checkpoint"
        )
