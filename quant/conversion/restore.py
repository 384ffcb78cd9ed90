"""GGUF -> safetensors, dequantized: for tools that read no GGUF."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import QuantError
from ..files.atomic_file import AtomicFile
from ..files.safetensors_header import safetensors_header
from ..files.sentencepiece import SPIECE_KEY
from ..gguf.provenance import source_metadata
from ..inspection.report import GIB
from ..sources.attention import preference_tensors, without_preferences
from ..sources.files import SourceFiles
from ..sources.layers import source_tensors
from ..sources.opening import Opened, open_files
from ..sources.t5 import SPIECE_TENSOR, transformers_name
from ..sources.tensors import SourceTensor
from .stream import Progress

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

_NAMES = {torch.uint8: "U8"} | {dtype: name for name, dtype in DTYPES.items()}
_SLICE_WEIGHTS = 1 << 22


@dataclass(frozen=True)
class Restoration:
    """The written file."""

    source: Path
    path: Path
    nbytes: int
    dtype: str
    """Of the tensors that were quantized; the others keep theirs."""
    tensors: int
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
    """Writes the dequantized weights of a GGUF, slice by slice; the destination appears complete or not at all.

    Args:
        source: a GGUF, or the first part of a split one. A T5 text encoder gets the names that ComfyUI reads.
        destination: path of a .safetensors file.
        dtype: of what was quantized, a key of `DTYPES`; F32, F16 and BF16 tensors are copied as they are.
        overwrite: replace an existing destination.
        progress: called with bytes written, bytes in all and the tensor's name.

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
            raise QuantError(f"{source}: not a GGUF; only GGUF files are restored")
        content = _Content(opened, DTYPES[dtype.upper()])
        path = content.write(destination, overwrite, progress)
    finally:
        SourceFiles(opened.files).close()
    seconds = time.monotonic() - started
    return Restoration(source, path, content.nbytes, dtype.upper(), len(content.weights), seconds)


class _Content:
    """What the file will hold."""

    def __init__(self, opened: Opened, dtype: torch.dtype) -> None:
        self.files = opened.files
        self.weights = [_Weight(tensor, dtype) for tensor in source_tensors(opened.tensors, {})]
        spiece, metadata = opened.metadata.get(SPIECE_KEY), source_metadata(opened.metadata)
        tokenizer = {} if spiece is None else {SPIECE_TENSOR: torch.from_numpy(np.array(spiece, np.uint8))}
        self.bytes = tokenizer | preference_tensors(metadata)
        self.header = _header(self.weights, self.bytes, without_preferences(metadata))
        data_bytes = sum(w.nbytes for w in self.weights) + sum(t.nbytes for t in self.bytes.values())
        self.nbytes = len(self.header) + data_bytes

    def write(self, destination: Path, overwrite: bool, progress: Progress | None) -> Path:
        with AtomicFile(destination, self.nbytes, overwrite=overwrite) as file:
            file.write(self.header)
            done = len(self.header)
            for weight in self.weights:
                for piece in weight.pieces():
                    file.write(piece.view(torch.uint8).numpy().data)
                    done += piece.nbytes
                    if progress is not None:
                        progress(done, self.nbytes, weight.name)
            for tensor in self.bytes.values():
                file.write(tensor.numpy().data)
            for part in self.files:
                part.identity.check_unchanged()
            return file.commit()


class _Weight:
    """One tensor on its way out."""

    def __init__(self, tensor: SourceTensor, dtype: torch.dtype) -> None:
        self.tensor = tensor
        self.name = transformers_name(tensor.name)
        self.dtype = tensor.dtype if tensor.stored in DTYPES else dtype
        self.nbytes = math.prod(tensor.shape) * self.dtype.itemsize

    def pieces(self) -> Iterator[Tensor]:
        total = math.prod(self.tensor.shape)
        for start in range(0, total, _SLICE_WEIGHTS):
            values = self.tensor.read(start, min(start + _SLICE_WEIGHTS, total))
            piece = values.to(self.dtype)
            if self.dtype == torch.float16 and bool((piece.isinf() & ~values.isinf()).any()):
                raise QuantError(f"tensor {self.name}: has values beyond the range of F16; choose BF16 or F32")
            yield piece


def _header(weights: list[_Weight], more: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    tensors = [(weight.name, _NAMES[weight.dtype], weight.tensor.shape, weight.nbytes) for weight in weights]
    tensors += [(name, _NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes) for name, tensor in more.items()]
    return safetensors_header(tensors, metadata)
