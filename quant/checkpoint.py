"""Source checkpoints: whatever file or folder, as weights under ComfyUI's names, read piece by piece."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from .provenance import source_metadata
from .sources.files import SourceFiles, SourceIdentity
from .sources.layers import QUANTIZATION_METADATA, Format, declared_formats, source_tensors
from .sources.names import find_naming
from .sources.opening import Opened, open_files
from .sources.tensors import SourceTensor, StoredTensor

__all__ = ["Checkpoint", "SourceTensor", "open_checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """An open source. `tensors` are in file order, under ComfyUI's names without prefix."""

    identity: SourceIdentity
    metadata: Mapping[str, str]
    tensors: Mapping[str, SourceTensor]
    file: SourceFiles = field(repr=False, compare=False)

    @property
    def path(self) -> Path:
        return self.identity.path

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors, as they are read."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def stored(self) -> str:
        """How most weights are stored."""
        weights: Counter[str] = Counter()
        for tensor in self.tensors.values():
            weights[tensor.stored] += math.prod(tensor.shape)
        return weights.most_common(1)[0][0]

    @property
    def lossy(self) -> tuple[str, ...]:
        """How weights are stored that were quantized already; quantizing them again adds a second error."""
        return tuple(sorted({tensor.stored for tensor in self.tensors.values()} - {"F32", "F16", "BF16"}))

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a Wan checkpoint.

    Args:
        path: safetensors (plain, FP8, or in ComfyUI's quantized formats), a folder of shards or its index, or a GGUF.

    Raises:
        QuantError: no such file, a pickle, a damaged or missing part, not a Wan model, or an unsupported format.
    """
    path = Path(path)
    opened = open_files(path)
    files = SourceFiles(opened.files)
    try:
        metadata = source_metadata(opened.metadata) if opened.is_gguf else dict(opened.metadata)
        stored = _named(path, opened)
        formats = _by_new_name(declared_formats(path, metadata), stored)
        metadata.pop(QUANTIZATION_METADATA, None)
        tensors = {tensor.name: tensor for tensor in source_tensors(list(stored.values()), formats)}
    except BaseException:
        files.close()
        raise
    identity = SourceIdentity(path, tuple(file.identity for file in opened.files))
    return Checkpoint(identity, metadata, tensors, files)


def _named(path: Path, opened: Opened) -> dict[str, StoredTensor]:
    """The tensors of the transformer by their names in the file, with their new ones; what lies outside is left out."""
    naming = find_naming(path, {tensor.name for tensor in opened.tensors})
    return {
        tensor.name: replace(tensor, name=naming.rename(tensor.name[len(naming.prefix) :]))
        for tensor in opened.tensors
        if tensor.name.startswith(naming.prefix)
    }


def _by_new_name(formats: Mapping[str, Format], stored: Mapping[str, StoredTensor]) -> dict[str, Format]:
    # The host reads these names both before and after it strips the prefix.
    weights = {name.removesuffix(".weight"): tensor.name.removesuffix(".weight") for name, tensor in stored.items()}
    return {weights.get(layer, layer): config for layer, config in formats.items()}
