"""Restoration of a GGUF as a dequantized safetensors file, for tools that cannot read GGUF."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import PrintableLog, QuantError, escaped
from ..files.atomic_file import AtomicFile
from ..files.safetensors_content import SafetensorsContent, StreamedTensor
from ..files.sentencepiece import has_tokenizer, sentencepiece_model
from ..progress import Progress
from ..sources.attention import preference_tensors, without_preferences
from ..sources.checkpoint import Checkpoint, checkpoint_of
from ..sources.files import SourceFiles
from ..sources.names import Naming, known_naming
from ..sources.opening import open_files
from ..sources.t5 import SPIECE_TENSOR, transformers_name
from ..sources.tensors import NUMBERS, SourceTensor
from ..units import GIB, counted

_log = PrintableLog(__name__)

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_KEPT = {*DTYPES, *NUMBERS}

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
        return escaped(
            f"{self.source.name} -> {self.path.name} ({self.nbytes / GIB:.3f} GiB, {counted(self.tensors, 'tensor')},"
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
        source: a GGUF, or the first part of a split one. The tensors of Wan and of T5 text encoders get the names and
            shapes that ComfyUI reads.
        destination: path of a .safetensors file.
        dtype: the dtype of tensors that were quantized, a key of `DTYPES`. F32, F16 and BF16 tensors are copied as
            they are, and other numbers become F32.
        overwrite: replace an existing destination.
        progress: is called with the bytes written, the bytes in total and the name of the tensor.

    Raises:
        QuantError: an unusable source or destination, a text encoder without tokenizer, or values that `dtype` cannot
            hold.
    """
    started = time.monotonic()
    source, destination = Path(source), Path(destination)
    if destination.suffix.lower() != ".safetensors":
        raise QuantError(f"{destination}: not a .safetensors name; choose a destination that ends in .safetensors")
    if dtype.upper() not in DTYPES:
        raise QuantError(f"dtype {dtype}: unknown; choose one of {', '.join(DTYPES)}")
    with _open(source) as checkpoint:
        weights = [_restored(tensor, DTYPES[dtype.upper()]) for tensor in checkpoint.tensors.values()]
        content = _content(weights, checkpoint)
        for warning in checkpoint.left_out:
            _log.warning(warning)
        with AtomicFile(destination, content.nbytes, overwrite=overwrite) as file:
            content.write(file, progress)
            checkpoint.identity.check_unchanged()
            path = file.commit()
    seconds = time.monotonic() - started
    return Restoration(source, path, content.nbytes, dtype.upper(), len(weights), seconds)


def _open(source: Path) -> Checkpoint:
    """Open a GGUF of any model; one that this pack knows gets the names and shapes of ComfyUI's model."""
    opened = open_files(source)
    if not opened.is_gguf:
        SourceFiles(opened.files).close()
        raise QuantError(f"{source}: not a GGUF file; choose a GGUF file to restore")
    return checkpoint_of(source, opened, lambda path, names: known_naming(path, names) or Naming("", str, "another"))


def _content(weights: Sequence[StreamedTensor], checkpoint: Checkpoint) -> SafetensorsContent:
    """Return the content of the file: the weights, then the tokenizer and the attention preferences."""
    tokenizer, metadata = checkpoint.gguf_metadata, checkpoint.metadata
    spiece = {SPIECE_TENSOR: sentencepiece_model(tokenizer)} if has_tokenizer(tokenizer) else {}
    extras = {name: torch.frombuffer(bytearray(model), dtype=torch.uint8) for name, model in spiece.items()}
    more = (StreamedTensor.whole(*extra) for extra in (extras | preference_tensors(metadata)).items())
    return SafetensorsContent((*weights, *more), without_preferences(metadata))


def _restored(tensor: SourceTensor, quantized: torch.dtype) -> StreamedTensor:
    """Return the tensor in its own dtype, or in `quantized` if it was quantized."""
    name, dtype = transformers_name(tensor.name), tensor.dtype if tensor.stored in _KEPT else quantized

    def pieces() -> Iterator[Tensor]:
        total = math.prod(tensor.shape)
        for start in range(0, total, _SLICE_ELEMENTS):
            values = tensor.read(start, min(start + _SLICE_ELEMENTS, total))
            piece = values.to(dtype)
            if dtype == torch.float16 and bool((piece.isinf() & ~values.isinf()).any()):
                raise QuantError(f"tensor {name}: has values beyond the range of F16; choose BF16 or F32")
            yield piece

    return StreamedTensor(name, dtype, tensor.shape, pieces)
