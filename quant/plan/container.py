"""What a file for a size may hold: the types that a tensor may get, their bytes, and those of the header.

Source: "Format" of https://github.com/huggingface/safetensors, README.md.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..native.layer_type import LayerType
from ..native.registry import NATIVE, companions
from ..qtype import QTYPES, QuantType
from ..safetensors.layout import NativeSpec, PlainBytes, SafetensorsLayout
from ..sources.t5 import SPIECE_TENSOR, transformers_name
from .file_size import header_bytes, padded_bytes
from .recipe import (
    EMBEDDING,
    EMBEDDING_TYPE,
    StoredType,
    TensorInfo,
    is_native_layer,
    kept_type,
    native_type,
    required_precision,
    sixteen_bit,
    type_or_fallback,
)

_QUANTIZED_TYPES = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
# These take several times as long to measure, so only sizes that are below that of Q3_K everywhere use them.
SMALL_TYPES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
_SMALL = "Q3_K"
# No file is larger than so many bytes, by which the digits of places in it are counted.
_MOST_BYTES = 10**12 - 1


class Container(ABC):
    """A kind of file."""

    @abstractmethod
    def types(self, name: str, tensor: TensorInfo, *, small: bool = True) -> list[StoredType]:
        """Return the types that a tensor may get.

        Args:
            small: whether IQ1, IQ2 and IQ3 are among them.
        """

    @abstractmethod
    def nbytes(self, name: str, stored: StoredType, tensor: TensorInfo) -> int:
        """Return the most bytes that a tensor of this type adds to the file."""

    @abstractmethod
    def header_bytes(self, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, Any]) -> int:
        """Return the most bytes that do not depend on the types."""

    def is_small(self, nbytes: int, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, Any]) -> bool:
        """Return whether a file of at most `nbytes` needs IQ1, IQ2 or IQ3."""
        return False


@dataclass(frozen=True)
class GGUFContainer(Container):
    """A GGUF."""

    five_d: bool = False
    """Whether tensors with five dimensions keep them in the file."""

    def types(self, name: str, tensor: TensorInfo, *, small: bool = True) -> list[StoredType]:
        return [*_gguf_types(name, tensor, small=small)]

    def nbytes(self, name: str, stored: StoredType, tensor: TensorInfo) -> int:
        assert isinstance(stored, QuantType)
        return padded_bytes(stored, tensor)

    def header_bytes(self, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, Any]) -> int:
        types = {name: _gguf_types(name, tensor)[0] for name, tensor in tensors.items()}
        return header_bytes(types, tensors, metadata, five_d=self.five_d)

    def is_small(self, nbytes: int, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, Any]) -> bool:
        sizes = (_bytes_at(_SMALL, name, tensor) for name, tensor in tensors.items())
        return nbytes < self.header_bytes(tensors, metadata) + sum(sizes)


@dataclass(frozen=True)
class NativeContainer(Container):
    """A safetensors file in ComfyUI's own formats."""

    recipe: str
    """A native format; the file loads wherever one in this format does."""
    tokenizer_bytes: int = 0
    """The bytes of the tokenizer of a text encoder."""

    def types(self, name: str, tensor: TensorInfo, *, small: bool = True) -> list[StoredType]:
        found: list[StoredType] = []
        if is_native_layer(name, tensor):
            formats = (native_type(NATIVE[other], tensor) for other in companions(self.recipe))
            found += [stored for stored in formats if isinstance(stored, LayerType)]
        return [*found, kept_type(tensor)]

    def nbytes(self, name: str, stored: StoredType, tensor: TensorInfo) -> int:
        spec = NativeSpec(name, stored, tensor.shape, transformers_name(name))
        entries = (
            {part: {"dtype": dtype, "shape": shape, "data_offsets": [_MOST_BYTES, _MOST_BYTES]}}
            for part, dtype, shape, _ in spec.entries()
        )
        # An entry is followed by a comma instead of two braces around it.
        return spec.nbytes + sum(len(json.dumps(entry, separators=(",", ":"))) - 1 for entry in entries)

    def header_bytes(self, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, Any]) -> int:
        spec = NativeSpec(SPIECE_TENSOR, PlainBytes(), (self.tokenizer_bytes,))
        layout = SafetensorsLayout(Path("unwritten.safetensors"), metadata, [spec] if self.tokenizer_bytes else [])
        # The places of the tokenizer and the padding to 8 bytes.
        return layout.nbytes + 2 * len(str(_MOST_BYTES)) + 8


def _gguf_types(name: str, tensor: TensorInfo, *, small: bool = True) -> list[QuantType]:
    """Return the types that a tensor may get: F32 only, Q8_0 or 16 bits if it is protected, or all types.

    Args:
        small: whether IQ1, IQ2 and IQ3 are among them.
    """
    precision = required_precision(name, tensor)
    if precision == "exact":
        return [QTYPES["F32"]]
    if precision == "protected":
        names: tuple[str, ...] = ("Q8_0",)
    else:
        quantized = (*SMALL_TYPES, *_QUANTIZED_TYPES) if small else _QUANTIZED_TYPES
        names = (EMBEDDING_TYPE, "Q8_0") if name == EMBEDDING else quantized
    qtypes = (type_or_fallback(wanted, tensor) for wanted in (*names, sixteen_bit(tensor)))
    return list({qtype.name: qtype for qtype in qtypes}.values())


def _bytes_at(qtype: str, name: str, tensor: TensorInfo) -> int:
    """Return the bytes of a tensor in a GGUF if it gets this type wherever it may."""
    qtypes = _gguf_types(name, tensor)
    wanted = type_or_fallback(qtype, tensor)
    return padded_bytes(wanted if wanted in qtypes else qtypes[0], tensor)
