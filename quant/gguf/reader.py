"""Opens GGUF files for reading: records of `gguf_header` with their data mapped, never copied."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import QuantError
from .header import FileIdentity, Header, TensorRecord, read_header


@dataclass(frozen=True)
class GGUFTensor(TensorRecord):
    """A tensor record with its data."""

    mapping: Tensor = field(repr=False, compare=False)
    """uint8, (file size,): the whole file, shared by its tensors."""

    @property
    def data(self) -> Tensor:
        """uint8, (*stored_shape[:-1], row_bytes): a view of the mapping. Writing to it does not change the file."""
        packed = self.mapping[self.offset : self.offset + self.nbytes]
        return packed.view(self.qtype.packed_shape(self.stored_shape or (1,)))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """A fresh tensor of `shape` and `dtype`."""
        return self.qtype.dequantize(self.data, dtype).view(self.shape)


@dataclass(frozen=True)
class GGUFFile(Header):
    """An open GGUF. The mapping lives as long as any of its tensors does."""

    tensors: Mapping[str, GGUFTensor]


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Maps a GGUF, or all parts of a split one.

    A file renamed over or deleted while it is open stays readable (`check_unchanged` tells); one truncated in place
    does not, and the operating system ends the process that touches the missing pages.

    Raises:
        QuantError: the file is no well-formed GGUF (see `read_header`), or cannot be mapped.
    """
    header = read_header(path)
    mappings = {part.path: map_private(part) for part in header.parts}
    # The header was read before the file was mapped: both must be of the same file.
    header.check_unchanged()
    tensors = {
        name: GGUFTensor(**vars(record), mapping=mappings[record.path]) for name, record in header.tensors.items()
    }
    return GGUFFile(header.path, header.metadata, tensors, header.parts)


def map_private(part: FileIdentity) -> Tensor:
    """uint8, (file size,): writing to it does not change the file.

    Raises:
        QuantError: the system refuses.
    """
    # Pages must be writable and private: CUDA refuses to pin read-only ones in place.
    try:
        return torch.from_file(os.fspath(part.path), shared=False, size=part.size, dtype=torch.uint8)
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise QuantError(f"{part.path}: cannot be mapped into memory: {reason}") from None
