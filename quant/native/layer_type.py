"""LayerType, a native format as the type of one weight: what the types of GGUF are to a conversion."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .native_format import NativeFormat, Part, Rounding
from .rotation import rotate

DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F32": torch.float32,
}
"""The dtypes of stored parts, by their names in safetensors."""


@dataclass(frozen=True)
class LayerType:
    """A native format for a weight of one shape, whose parts lie one after the other in the file."""

    format: NativeFormat
    shape: tuple[int, int]

    @property
    def name(self) -> str:
        """The name in plans and reports: see `type_name`."""
        return type_name(self.format)

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.format.parts(self.shape)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / math.prod(self.shape)

    def packed_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the bytes of a weight of this type."""
        return (self.nbytes,)

    def quantize(
        self,
        weight: Tensor,
        importance: Tensor | None = None,
        effort: str = "best",
        rounding: Rounding | None = None,
    ) -> Tensor:
        """Encode the whole weight.

        Args:
            weight: floating point, of this type's shape, on any device.
            importance: floating point, (in_features,).
            effort: "fast", "best" or "thorough", which is the same as "best". With a rounding, all are.
            rounding: rounds the weights in place of rounding each to the nearest level.

        Returns:
            uint8, (n,): the bytes of all parts, on the device of the weight.
        """
        search: Literal["fast", "best"] = "fast" if effort == "fast" and rounding is None else "best"
        return self.join(self.format.encode(weight.float(), importance, search, rounding))

    def dequantize(self, packed: Tensor) -> Tensor:
        """Decode the bytes of all parts, uint8 of any shape, to float32 of this type's shape."""
        return self.format.decode(self.split(packed), self.shape, rotate)

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the bytes of all parts, which have the dtypes and shapes of the file: uint8, (n,)."""
        return torch.cat([_bytes(parts[part.suffix], part) for part in self.parts])

    def split(self, packed: Tensor) -> Mapping[str, Tensor]:
        """Return the parts by suffix, in the dtypes and shapes of the file; `packed` is uint8 of any shape."""
        sizes = [part.nbytes for part in self.parts]
        pieces = torch.split(packed.reshape(-1), sizes)
        # A part may start at an odd byte, where torch makes no view of a wider dtype.
        return {
            part.suffix: piece.clone().view(DTYPES[part.dtype]).view(part.shape)
            for part, piece in zip(self.parts, pieces, strict=True)
        }


def type_name(native: NativeFormat) -> str:
    """Return the name of a format in plans and reports; GGUF has other types named NVFP4 and MXFP4."""
    return f"{native.name} (ComfyUI)" if native.name == "NVFP4" else native.name


def _bytes(tensor: Tensor, part: Part) -> Tensor:
    """Return the bytes of a stored tensor of any dtype: uint8, flat, on its device."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    assert tuple(tensor.shape) == part.shape and len(flat) == part.nbytes, f"{part}: {tensor.shape} {tensor.dtype}"
    return flat
