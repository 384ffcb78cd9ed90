"""Opening GGUF files: tensor records whose data is mapped into memory, never copied."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import QuantError
from .file_identity import FileIdentity
from .header import Header, TensorRecord, read_header


@dataclass(frozen=True)
class GGUFTensor(TensorRecord):
    """A tensor record with access to its data."""

    mapping: Tensor = field(repr=False, compare=False)
    """The whole file, which its tensors share: uint8 (file size,)."""

    @property
    def data(self) -> Tensor:
        """The packed data, a view of the mapping: uint8 (*stored_shape[:-1], bytes per row).

        Writing to it does not change the file.
        """
        packed = self.mapping[self.offset : self.offset + self.nbytes]
        return packed.view(self.qtype.packed_shape(self.stored_shape or (1,)))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dequantize into a new tensor of `dtype` and `shape`."""
        return self.qtype.dequantize(self.data, dtype).view(self.shape)


@dataclass(frozen=True)
class GGUFFile(Header):
    """An open GGUF; the mapping exists as long as any of its tensors does."""

    tensors: Mapping[str, GGUFTensor]


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Map a GGUF, or all parts of a split one, into memory.

    If the file is deleted or replaced while it is open, the mapping stays readable, and `check_unchanged` raises. If it
    is truncated in place, the operating system ends a process that reads the missing pages.

    Raises:
        QuantError: the file is not a well-formed GGUF (see `read_header`), or cannot be mapped.
    """
    header = read_header(path)
    mappings = {part.path: map_private(part) for part in header.parts}
    # The header was read before the file was mapped, so the file may have been replaced in between.
    header.check_unchanged()
    tensors = {
        name: GGUFTensor(**vars(record), mapping=mappings[record.path]) for name, record in header.tensors.items()
    }
    return GGUFFile(header.path, header.metadata, tensors, header.parts)


def map_private(part: FileIdentity) -> Tensor:
    """Map a file into memory, so that writing to the mapping does not change the file.

    Returns:
        uint8 (file size,).

    Raises:
        QuantError: the system refuses to map the file.
    """
    # Pages must be writable, since CUDA refuses to pin read-only ones in place. So they are private.
    try:
        return torch.from_file(os.fspath(part.path), shared=False, size=part.size, dtype=torch.uint8)
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise QuantError(
            f"{part.path}: cannot be mapped into memory: {reason}; check the file's permissions and the free memory"
        ) from None
