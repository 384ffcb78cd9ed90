"""Restoration of a GGUF as a dequantized safetensors file, for tools that cannot read GGUF."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import QuantError
from ..files.atomic_file import AtomicFile
from ..files.safetensors_content import SafetensorsContent, StreamedTensor
from ..files.sentencepiece import SPIECE_KEY
from ..files.typed_metadata import TypedMetadata
from ..gguf.provenance import source_metadata
from ..progress import Progress
from ..sources.attention import preference_tensors, without_preferences
from ..sources.files import SourceFiles
from ..sources.layers import source_tensors
from ..sources.opening import open_files
from ..sources.t5 import SPIECE_TENSOR, transformers_name
from ..sources.tensors import SourceTensor
from ..units import GIB

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

_SLICE_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Restoration:
    """A report of a restored file."""

    source: Path
    path: Path
    nbytes: int
    dtype: str
    """The dtype of the tensors that were quantized; the others keep their own."""
    tensors: int
    """The number of tensors."""
    seconds: float

    def text(self) -> str:
        return (
            f"{self.source.name} -> {self.path.name} ({self.nbytes / GIB:.3f} GiB, {self.tensors} tensors,"
            f" quantized ones as {self.dtype}), written in {self.seconds:.1f} s"
        )

    def json(self) -> dict[str, Any]:
        return {**asdict(self), "source": str(self.source), "path": str(self.path)}


def restore(
    source: str | Path,
    destination: str | Path,
    dtype: str = "BF16",
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Restoration:
    """Dequantize a GGUF and write it as a safetensors file, slice by slice.

    The destination appears complete or not at all.

    Args:
        source: a GGUF, or the first part of a split one. The tensors of a T5 text encoder get the names that ComfyUI
            reads.
        destination: path of a .safetensors file.
        dtype: the dtype of tensors that were quantized, a key of `DTYPES`. F32, F16 and BF16 tensors are copied as
            they are.
        overwrite: replace an existing destination.
        progress: is called with the bytes written, the bytes in total and the name of the tensor.

    Raises:
        QuantError: an unusable source or destination, or values that `dtype` cannot hold.
    """
    started = time.monotonic()
    source, destination = Path(source), Path(destination)
    if destination.suffix.lower() != ".safetensors":
        raise QuantError(f"{destination}: not a .safetensors name; choose a destination that ends in .safetensors")
    if dtype.upper() not in DTYPES:
        raise QuantError(f"dtype {dtype}: unknown; choose one of {', '.join(DTYPES)}")
    opened = open_files(source)
    try:
        if not opened.is_gguf:
            raise QuantError(f"{source}: not a GGUF file; choose a GGUF file to restore")
        weights = [_restored(tensor, DTYPES[dtype.upper()]) for tensor in source_tensors(opened.tensors, {})]
        content = _content(weights, opened.metadata)
        with AtomicFile(destination, content.nbytes, overwrite=overwrite) as file:
            content.write(file, progress)
            for part in opened.files:
                part.identity.check_unchanged()
            path = file.commit()
    finally:
        SourceFiles(opened.files).close()
    seconds = time.monotonic() - started
    return Restoration(source, path, content.nbytes, dtype.upper(), len(weights), seconds)


def _content(weights: Sequence[StreamedTensor], gguf_metadata: Mapping[str, Any]) -> SafetensorsContent:
    """Return the content of the file: the weights, then the tokenizer and the attention preferences."""
    spiece, metadata = TypedMetadata(gguf_metadata, "tokenizer").raw(SPIECE_KEY), source_metadata(gguf_metadata)
    tokenizer = {SPIECE_TENSOR: torch.from_numpy(np.frombuffer(spiece, np.uint8).copy())} if spiece else {}
    extras = (tokenizer | preference_tensors(metadata)).items()
    return SafetensorsContent(
        (*weights, *(StreamedTensor.whole(*extra) for extra in extras)), without_preferences(metadata)
    )


def _restored(tensor: SourceTensor, quantized: torch.dtype) -> StreamedTensor:
    """Return the tensor in its own dtype, or in `quantized` if it was quantized."""
    name, dtype = transformers_name(tensor.name), tensor.dtype if tensor.stored in DTYPES else quantized

    def pieces() -> Iterator[Tensor]:
        total = math.prod(tensor.shape)
        for start in range(0, total, _SLICE_ELEMENTS):
            values = tensor.read(start, min(start + _SLICE_ELEMENTS, total))
            piece = values.to(dtype)
            if dtype == torch.float16 and bool((piece.isinf() & ~values.isinf()).any()):
                raise QuantError(f"tensor {name}: has values beyond the range of F16; choose BF16 or F32")
            yield piece

    return StreamedTensor(name, dtype, tensor.shape, pieces)
