"""Tensors whose values stay in their file until they are read.

A `StoredTensor` is the data in the file. A `SourceTensor` is one tensor of the model, which may combine several stored
ones.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import QuantError
from ..qtype import QuantType
from .files import HashedFile

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""The dtypes of weights, by their names in safetensors."""
NUMBERS = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F64": torch.float64,
}
"""The dtypes of what lies beside the weights, such as position ids; a matrix of integers may be packed codes."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it is stored in a file."""

    name: str
    dtype: str
    """The name of the dtype in safetensors, or of the type in ggml."""
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    file: HashedFile = field(repr=False, compare=False)

    def read(self, start: int, stop: int) -> Tensor:
        """Return the bytes `start` to `stop` of the data: uint8, (stop - start,)."""
        return self.file.read(self._place(start, stop), stop - start)

    def peek(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return what `read` does, uint8 (stop - start,), without hashing: for small tensors that belong to others."""
        stop = self.nbytes if stop is None else stop
        return self.file.peek(self._place(start, stop), stop - start)

    def _place(self, start: int, stop: int) -> int:
        """Return the place of byte `start` in the file; bytes of other tensors are never read."""
        if not 0 <= start <= stop <= self.nbytes:
            raise QuantError(
                f"{self.file.path}: tensor {self.name}: {self.dtype} of shape {self.shape} has {self.nbytes} bytes,"
                f" expected at least {stop}; the file is damaged, download it again"
            )
        return self.offset + start


@dataclass(frozen=True)
class SourceTensor(ABC):
    """One tensor of a model."""

    name: str
    dtype: torch.dtype
    """The dtype of the values that `read` returns."""
    shape: tuple[int, ...]
    stored: str
    """The storage format in the file: a dtype, a ggml type, or the name of one of ComfyUI's formats."""

    @property
    def nbytes(self) -> int:
        """The bytes of all values in `dtype`."""
        return math.prod(self.shape) * self.dtype.itemsize

    @abstractmethod
    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the values `start` to `stop` in row-major order: `dtype`, (stop - start,)."""

    def read_packed(self, start: int, stop: int) -> Tensor | None:
        """Return the values as uint8 blocks of the ggml type `stored`, or None if it is not a ggml type with blocks."""
        return None

    def _stop(self, stop: int | None) -> int:
        return math.prod(self.shape) if stop is None else stop


@dataclass(frozen=True)
class PlainTensor(SourceTensor):
    """A tensor of plain numbers; FP8 is read as BF16, which represents every FP8 value, and `NUMBERS` as F32."""

    data: StoredTensor

    @classmethod
    def of(cls, data: StoredTensor) -> PlainTensor:
        dtype = torch.float32 if data.dtype in NUMBERS else DTYPES[data.dtype]
        return cls(data.name, torch.bfloat16 if dtype.itemsize == 1 else dtype, data.shape or (1,), data.dtype, data)

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        dtype = (DTYPES | NUMBERS)[self.data.dtype]
        return self.data.read(start * dtype.itemsize, self._stop(stop) * dtype.itemsize).view(dtype).to(self.dtype)


@dataclass(frozen=True)
class FiniteTensor(SourceTensor):
    """Another tensor with 0 in place of NaN and infinity."""

    tensor: SourceTensor
    zeroed: set[str] = field(repr=False, compare=False)
    """The names of tensors that hold such values are added to this set when they are read."""

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
    """A tensor of blocks of a ggml type, from a GGUF."""

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


def sample_rows(tensor: SourceTensor, count: int) -> Tensor:
    """Return rows of a tensor at even distances, float32 (rows, in_features): at least 1, at most `count` or all."""
    in_features = tensor.shape[-1]
    n_rows = math.prod(tensor.shape[:-1])
    count = min(n_rows, max(1, count))
    starts = [(2 * index + 1) * n_rows // (2 * count) * in_features for index in range(count)]
    return torch.stack([tensor.read(start, start + in_features) for start in starts]).float()
