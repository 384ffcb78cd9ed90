"""Tensors whose values stay in their file until they are read, as they are stored and as weights."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..qtype import QuantType
from .files import HashedFile

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Stored types that are plain numbers, by safetensors' names."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies in a file."""

    name: str
    dtype: str
    """Safetensors' or ggml's name."""
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    file: HashedFile = field(repr=False, compare=False)

    def read(self, start: int, stop: int) -> Tensor:
        """uint8: bytes `start` to `stop` of the data."""
        return self.file.read(self.offset + start, stop - start)

    def peek(self, start: int = 0, stop: int | None = None) -> Tensor:
        """`read`, for the small tensors that belong to another one."""
        stop = self.nbytes if stop is None else stop
        return self.file.peek(self.offset + start, stop - start)


@dataclass(frozen=True)
class SourceTensor(ABC):
    """One weight of a checkpoint; `dtype` is that of the values `read` gives."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stored: str
    """How the file stores it: a dtype, a ggml type or the name of a scaled format."""

    @property
    def nbytes(self) -> int:
        """Bytes of all values in `dtype`."""
        return math.prod(self.shape) * self.dtype.itemsize

    @abstractmethod
    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Values `start` to `stop` in row-major order: a flat tensor of `dtype`."""

    def read_packed(self, start: int, stop: int) -> Tensor | None:
        """These values as blocks of the ggml type `stored`, uint8, or None where they are not stored so."""
        return None

    def _stop(self, stop: int | None) -> int:
        return math.prod(self.shape) if stop is None else stop


@dataclass(frozen=True)
class PlainTensor(SourceTensor):
    """Numbers; FP8 is read as BF16, which holds every FP8 value."""

    data: StoredTensor

    @classmethod
    def of(cls, data: StoredTensor) -> PlainTensor:
        dtype = DTYPES[data.dtype]
        return cls(data.name, torch.bfloat16 if dtype.itemsize == 1 else dtype, data.shape or (1,), data.dtype, data)

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        dtype = DTYPES[self.data.dtype]
        return self.data.read(start * dtype.itemsize, self._stop(stop) * dtype.itemsize).view(dtype).to(self.dtype)


@dataclass(frozen=True)
class FiniteTensor(SourceTensor):
    """Another tensor, with 0 for NaN and infinity."""

    tensor: SourceTensor
    zeroed: set[str] = field(repr=False, compare=False)
    """Gets the names of the tensors that hold any."""

    @classmethod
    def of(cls, tensor: SourceTensor, zeroed: set[str]) -> FiniteTensor:
        return cls(tensor.name, tensor.dtype, tensor.shape, tensor.stored, tensor, zeroed)

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        values = self.tensor.read(start, stop)
        finite = values.isfinite()
        if bool(finite.all()):
            return values
        self.zeroed.add(self.name)
        return values.where(finite, torch.zeros_like(values))


@dataclass(frozen=True)
class PackedTensor(SourceTensor):
    """Blocks of a GGUF."""

    data: StoredTensor
    qtype: QuantType

    @classmethod
    def of(cls, data: StoredTensor, qtype: QuantType) -> PackedTensor:
        return cls(data.name, torch.float32, data.shape or (1,), qtype.name, data, qtype)

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        stop = self._stop(stop)
        block, size = self.qtype.block_size, self.qtype.type_size
        first, last = start // block, -(-stop // block)
        values = self.qtype.dequantize(self.data.read(first * size, last * size))
        return values[start - first * block : stop - first * block]

    def read_packed(self, start: int, stop: int) -> Tensor:
        block, size = self.qtype.block_size, self.qtype.type_size
        return self.data.read(start // block * size, stop // block * size)
