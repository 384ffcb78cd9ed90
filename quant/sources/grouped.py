"""ComfyUI's formats of 4 and 6 bits with scales for groups of input channels: `awq_w4a16` and `asym_w4a8_int8`.

Source: comfy_kitchen 0.2.40 tensor/awq_w4a16.py, tensor/w4a8_packed.py and backends/eager/w4a8_int8.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import QuantError
from ..native.packing import unpack_nibbles, unpack_six_bits
from ..native.rotation import hadamard
from .scaled import FoldedTensor, Layer, expect, numbers, rotation_group
from .tensors import DTYPES, SourceTensor, StoredTensor

_CODEBOOK_CODES = 16
_MAX_LEVEL = 127


@dataclass(frozen=True)
class AffineTensor(FoldedTensor):
    """A weight of 4-bit codes with a scale and a zero point per group, stored as (groups, rows)."""

    group: int
    zeros: StoredTensor

    def _rows(self, first: int, last: int) -> Tensor:
        codes = unpack_nibbles(self.layer.weight_rows(first, last)).view(last - first, -1, self.group)
        scale, zero = (self._per_group(part, first, last) for part in (self.layer.scale, self.zeros))
        return ((codes.float() - 8) * scale + zero).flatten(1)

    def _per_group(self, part: StoredTensor, first: int, last: int) -> Tensor:
        return numbers(part).view(-1, self.layer.rows)[:, first:last].T.unsqueeze(-1)


@dataclass(frozen=True)
class LevelsTensor(FoldedTensor):
    """A weight of 4-bit or 6-bit codes for 8-bit levels, which ConvRot rotated.

    The level of a code is its value times the scale of its group, rounded. Levels are multiplied by a scale per row.
    """

    group: int
    rotation: int
    table: Tensor
    """The value of each code: float32."""
    row_scale: StoredTensor
    correction: StoredTensor | None
    """What is added to the weights of each group: (groups, rows)."""

    def _rows(self, first: int, last: int) -> Tensor:
        codes = self._codes(self.layer.weight_rows(first, last))
        levels = self.table[codes.long()].view(last - first, -1, self.group) * self._group_scales(first, last)
        levels = levels.round().clamp_(-_MAX_LEVEL, _MAX_LEVEL)
        rows = levels * self.row_scale.peek(first * 4, last * 4).view(torch.float32).view(-1, 1, 1)
        if self.correction is not None:
            rows = rows + numbers(self.correction).view(-1, self.layer.rows)[:, first:last].T.unsqueeze(-1)
        return (rows.reshape(-1, self.rotation) @ hadamard(self.rotation)).view(last - first, -1)

    def _codes(self, packed: Tensor) -> Tensor:
        """Unpack the codes: first the low 4 bits of all, then the top 2 bits of all, if they have 6 bits."""
        return unpack_nibbles(packed) if len(self.table) == _CODEBOOK_CODES else unpack_six_bits(packed)

    def _group_scales(self, first: int, last: int) -> Tensor:
        scale = self.layer.scale
        dtype = torch.float32 if scale.dtype == "F32" else torch.float8_e4m3fn
        row_bytes = scale.nbytes // self.layer.rows
        return scale.peek(first * row_bytes, last * row_bytes).view(dtype).float().view(last - first, -1, 1)


def fold_affine(layer: Layer) -> SourceTensor:
    """Return the weight of a layer in the format `awq_w4a16`."""
    expect(layer, "I8", "U8")
    in_features, group = 2 * layer.row_bytes, layer.number("group_size", 64)
    zeros = _part(layer, "weight_zeros")
    shape = (in_features // group, layer.rows)
    for part in (layer.scale, zeros):
        if in_features % group or part.dtype not in DTYPES or part.shape != shape:
            raise _mismatch(layer, part, f"{shape} for group_size {group}")
    return AffineTensor(layer.weight.name, torch.float32, (layer.rows, in_features), "I4 AWQ", layer, group, zeros)


def fold_levels(layer: Layer) -> SourceTensor:
    """Return the weight of a layer in the format `asym_w4a8_int8`, whose number of bits follows from its row width."""
    expect(layer, "I8", "U8")
    scale, group = layer.scale, layer.number("group_size", 16)
    if len(scale.shape) != 2 or scale.shape[0] != layer.rows or scale.dtype not in ("F8_E4M3", "U8", "F32"):
        raise _mismatch(layer, scale, f"{layer.rows} rows")
    in_features = scale.shape[1] * group
    bits = 8 * layer.row_bytes // in_features
    if bits not in (4, 6) or bits * in_features != 8 * layer.row_bytes:
        raise layer.error(
            f"{layer.row_bytes} bytes per row for {in_features} input channels (group_size {group}), expected 4 or 6"
            " bits per weight; the file is damaged, download it again"
        )
    row_scale = _part(layer, "weight_s_channel")
    if row_scale.dtype != "F32" or row_scale.shape not in ((layer.rows,), (layer.rows, 1)):
        raise _mismatch(layer, row_scale, f"{(layer.rows,)} of F32")
    codebook, correction = (layer.parts.get(name) for name in ("weight_codebook", "weight_correction"))
    if codebook is not None and (bits == 6 or codebook.dtype not in DTYPES or codebook.shape != (_CODEBOOK_CODES,)):
        raise _mismatch(layer, codebook, f"{(_CODEBOOK_CODES,)} with 4 bits and none with 6")
    shape = (scale.shape[1], layer.rows)
    if correction is not None and (bits == 6 or correction.dtype not in DTYPES or correction.shape != shape):
        raise _mismatch(layer, correction, f"{shape} with 4 bits and none with 6")
    table = torch.arange(1 << bits).float() - (1 << bits - 1) if codebook is None else numbers(codebook)
    rotation = rotation_group(layer, in_features)
    return LevelsTensor(
        *(layer.weight.name, torch.float32, (layer.rows, in_features), f"W{bits}A8", layer),
        *(group, rotation, table, row_scale, correction),
    )


def _part(layer: Layer, name: str) -> StoredTensor:
    if name not in layer.parts:
        raise layer.error(
            f"has no {name}, expected one in format {layer.config['format']}; the file is damaged, download it again"
        )
    return layer.parts[name]


def _mismatch(layer: Layer, part: StoredTensor, expected: str) -> QuantError:
    suffix = part.name.rpartition(".")[2]
    return layer.error(
        f"{suffix} is {part.dtype} of shape {part.shape}, expected {expected}; the file is damaged, download it again"
    )
