"""FileLayout, the header of a GGUF v3 file and the places of its tensors, known before anything is written.

Source: ggml docs/gguf.md. Flattening: stable-diffusion.cpp core/ggml_extend.hpp Conv3d and model_io/gguf_reader_ext.h
@ 97d2990 read leading dimensions merged into one; city96/ComfyUI-GGUF loader.py get_orig_shape @ 001ffcf undoes it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import QuantError
from ..qtype import QuantType
from .header import ORIG_SHAPE_KEY, alignment_of, check_readable
from .values import pack_metadata, pack_name

_MAX_DIMS = 4
# GGML_MAX_NAME minus the terminating zero, as ComfyUI's GGUF tools and stable-diffusion.cpp build it.
_MAX_NAME_BYTES = 127


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written; `shape` is that of the model, in torch's order."""

    name: str
    qtype: QuantType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.qtype.packed_shape(self.shape or (1,)))


class FileLayout:
    """The header and the size of a file with these tensors and this metadata.

    Args:
        five_d: store tensors of more than 4 dimensions as they are, which WanVideoWrapper needs and llama.cpp refuses.
            Otherwise their leading dimensions are merged, and their shape is stored in
            `comfy.gguf.orig_shape.<name>`.

    Raises:
        QuantError: a name, a shape or a metadata value cannot be stored, or `read_header` would refuse the file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        metadata: Mapping[str, Any],
        tensors: Sequence[TensorSpec],
        *,
        five_d: bool = False,
    ) -> None:
        self.path, self.tensors = Path(path), tuple(tensors)
        self._check_tensors()
        self._alignment = alignment_of(metadata, self.path)
        self._stored_shapes = [spec.shape if five_d else _flattened(spec.shape) for spec in self.tensors]
        self._metadata = {**metadata, **self._orig_shapes()}
        self.header = self._pack_header(self._metadata)
        self.nbytes = len(self.header) + sum(self.padded(spec.nbytes) for spec in self.tensors)
        """The size of the file in bytes."""
        check_readable(self.path, self.header, self.nbytes)

    def header_with(self, metadata: Mapping[str, Any]) -> bytes:
        """Return the header with new values, each as long in the file as the value that it replaces.

        Raises:
            QuantError: the header does not have a key, or its value has another length.
        """
        for key, value in metadata.items():
            if len(pack_metadata({key: value})) != len(pack_metadata({key: self._metadata.get(key, "")})):
                raise QuantError(
                    f"{self.path}: metadata {key}: {value!r:.40}, expected a value of the size that was declared for"
                    " this key; declare a placeholder of the same type and length"
                )
        return self._pack_header({**self._metadata, **metadata})

    def padded(self, nbytes: int) -> int:
        """Return `nbytes` rounded up to the file's alignment."""
        return -(-nbytes // self._alignment) * self._alignment

    def _check_tensors(self) -> None:
        names = set()
        for spec in self.tensors:
            if spec.name in names or not 0 < len(pack_name(spec.name)) - 8 <= _MAX_NAME_BYTES or 0 in spec.shape:
                raise QuantError(
                    f"{self.path}: tensor {spec.name!r} of shape {spec.shape}: expected a unique name of 1 to"
                    f" {_MAX_NAME_BYTES} bytes and no dimension of size 0; rename or leave out the tensor"
                )
            names.add(spec.name)

    def _orig_shapes(self) -> dict[str, Any]:
        return {
            ORIG_SHAPE_KEY + spec.name: np.array(spec.shape, np.int32)
            for spec, stored in zip(self.tensors, self._stored_shapes, strict=True)
            if stored != spec.shape
        }

    def _pack_header(self, metadata: Mapping[str, Any]) -> bytes:
        infos, offset = [], 0
        for spec, shape in zip(self.tensors, self._stored_shapes, strict=True):
            dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
            infos.append(pack_name(spec.name) + dims + struct.pack("<IQ", spec.qtype.ggml_type, offset))
            offset += self.padded(spec.nbytes)
        head = struct.pack("<4sIQQ", b"GGUF", 3, len(self.tensors), len(metadata))
        header = head + pack_metadata(metadata) + b"".join(infos)
        return header.ljust(self.padded(len(header)), b"\0")


def _flattened(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Merge leading dimensions so that at most 4 remain."""
    n_merged = len(shape) - _MAX_DIMS + 1
    return (prod(shape[:n_merged]), *shape[n_merged:]) if n_merged > 1 else shape
