"""SafetensorsContent, the content of a safetensors file, whose size is known before it is written.

Source: github.com/huggingface/safetensors README, "Format".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..errors import QuantError
from .atomic_file import AtomicFile
from .safetensors_header import check_header

_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor that is written in pieces."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Tensor]]
    """Returns the elements in order, as tensors of `dtype` and any shape on the CPU."""

    @classmethod
    def whole(cls, name: str, tensor: Tensor) -> StreamedTensor:
        """Return a tensor, of any dtype and shape, as a single piece."""
        return cls(name, tensor.dtype, tuple(tensor.shape), lambda: (tensor,))

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class SafetensorsContent:
    """The tensors of a file, in the order in which they are written, and its metadata.

    Raises:
        QuantError: the format cannot store the dtype of a tensor, or `read_safetensors_header` would refuse the file.
    """

    def __init__(self, tensors: Iterable[StreamedTensor], metadata: Mapping[str, str]) -> None:
        self.tensors = tuple(tensors)
        self.header = self._pack_header(metadata)
        self.nbytes = len(self.header) + sum(tensor.nbytes for tensor in self.tensors)
        """The size of the file in bytes."""

    def write(self, file: AtomicFile, progress: Callable[[int, int, str], None] | None = None) -> None:
        """Write the whole file.

        Args:
            progress: called with the bytes written, the bytes of the file and the tensor's name.
        """
        file.write(self.header)
        done = len(self.header)
        for tensor in self.tensors:
            for piece in tensor.pieces():
                file.write(piece.contiguous().view(-1).view(torch.uint8).numpy().data)
                done += piece.nbytes
                if progress is not None:
                    progress(done, self.nbytes, tensor.name)

    def _pack_header(self, metadata: Mapping[str, str]) -> bytes:
        entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
        end = 0
        for tensor in self.tensors:
            if tensor.dtype not in _DTYPES:
                raise QuantError(
                    f"tensor {tensor.name}: {tensor.dtype}, expected a dtype of safetensors; convert it first"
                )
            begin, end = end, end + tensor.nbytes
            entries[tensor.name] = {"dtype": _DTYPES[tensor.dtype], "shape": tensor.shape, "data_offsets": [begin, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        check_header(text, len(self.tensors), len(metadata) + 1)
        return len(text).to_bytes(8, "little") + text
