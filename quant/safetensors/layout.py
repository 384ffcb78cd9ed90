"""SafetensorsLayout, the header of a converted safetensors file and the places of its tensors.

Source: "Format" of https://github.com/huggingface/safetensors, README.md; for the names of a layer's tensors,
comfy/ops.py _load_quantized_module, ComfyUI 0.30.0.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ..errors import QuantError
from ..files.safetensors_header import check_header
from ..native.layer_type import LayerType
from ..qtype import QuantType
from .metadata import to_text

_WEIGHT = "weight"


@dataclass(frozen=True)
class PlainBytes:
    """The type of a tensor that holds bytes, such as a tokenizer."""

    name: str = "U8"

    def packed_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the bytes."""
        return shape


@dataclass(frozen=True)
class NativeSpec:
    """A tensor of a model to be written: as it is, or as the tensors of a quantized layer."""

    name: str
    """The name in the source's model."""
    qtype: QuantType | LayerType | PlainBytes
    shape: tuple[int, ...]
    name_in_file: str = ""
    """The name in the file, if it is another one."""

    @property
    def nbytes(self) -> int:
        return prod(self.qtype.packed_shape(self.shape or (1,)))

    def entries(self) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
        """Yield the names, dtypes, shapes and bytes of the tensors in the file."""
        if not isinstance(self.qtype, LayerType):
            yield self.name_in_file or self.name, self.qtype.name, self.shape, self.nbytes
            return
        layer = (self.name_in_file or self.name).removesuffix(_WEIGHT)
        for part in self.qtype.parts:
            yield layer + part.suffix, part.dtype, part.shape, part.nbytes


class SafetensorsLayout:
    """The header and the size of a file with these tensors and this metadata.

    Args:
        metadata: of a conversion, as for a GGUF.

    Raises:
        QuantError: `read_safetensors_header` would refuse the file.
    """

    def __init__(self, path: Path, metadata: Mapping[str, Any], tensors: Sequence[NativeSpec]) -> None:
        self.path, self.tensors = path, tuple(tensors)
        self._metadata = dict(metadata)
        self.header = self._pack_header(self._metadata)
        self.nbytes = len(self.header) + sum(spec.nbytes for spec in self.tensors)
        """The size of the file in bytes."""

    def header_with(self, metadata: Mapping[str, Any]) -> bytes:
        """Return the header with new values, each as long in the file as the value that it replaces.

        Raises:
            QuantError: a value has another length.
        """
        header = self._pack_header({**self._metadata, **metadata})
        if len(header) != len(self.header):
            raise QuantError(
                f"{self.path}: a header of {len(header)} bytes, expected {len(self.header)} as declared; declare"
                " placeholders of the same length"
            )
        return header

    def padded(self, nbytes: int) -> int:
        """Return `nbytes`: the format has no gaps."""
        return nbytes

    def _pack_header(self, metadata: Mapping[str, Any]) -> bytes:
        text_of = to_text(metadata)
        entries: dict[str, object] = {"__metadata__": text_of}
        end = 0
        for spec in self.tensors:
            for name, dtype, shape, nbytes in spec.entries():
                begin, end = end, end + nbytes
                if name in entries:
                    raise QuantError(f"{self.path}: two tensors have the name {name}, expected one; rename one of them")
                entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        check_header(text, len(entries) - 1, len(text_of))
        return len(text).to_bytes(8, "little") + text
