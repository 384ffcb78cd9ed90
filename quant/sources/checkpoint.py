"""Checkpoints: files or folders of any supported layout, as tensors under ComfyUI's names."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import QuantError
from ..gguf.provenance import source_metadata
from .add_ons import check_add_on, check_has_layers, is_add_on
from .animate import joined_tensor, with_joined_halves
from .attention import take_preferences, without_preferences
from .baked_lora import LoRA, bake
from .completeness import check_complete, few_blocks
from .files import SourceFiles, SourceIdentity
from .layers import QUANTIZATION_METADATA, LayerFormat, contradiction, declared_formats, source_tensors
from .model_tensors import model_tensors
from .names import T5, Naming, find_naming
from .opening import OpenedFiles, open_files
from .t5 import is_tokenizer, t5_metadata
from .tensors import NUMBERS, FiniteTensor, SourceTensor, StoredTensor

__all__ = ["Checkpoint", "SourceTensor", "open_checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint, whose values stay in its files until they are read."""

    identity: SourceIdentity
    name: str
    """The name of the file or folder, and of the add-ons merged onto it."""
    metadata: Mapping[str, str]
    """The `__metadata__` of safetensors, from which ComfyUI detects the model, and the attention preferences."""
    architecture: str
    """The value of `general.architecture` in a GGUF of this model."""
    gguf_metadata: Mapping[str, Any]
    """Further metadata that a GGUF of this architecture needs."""
    tensors: Mapping[str, SourceTensor]
    """The tensors in file order, by ComfyUI's names without prefix."""
    files: SourceFiles = field(repr=False, compare=False)
    held_bytes: int = 0
    """The most bytes of main memory that reading needs in addition to the values that are read."""
    left_out: tuple[str, ...] = ()
    """Warnings of another model in the files, which is left out."""
    loras: tuple[LoRA, ...] = ()
    """The LoRAs that are added to the weights."""
    notes: tuple[str, ...] = ()
    """Sentences on what was added to the weights."""
    zeroed: set[str] | None = field(default=None, compare=False)
    """The names of the tensors in which NaN or infinity was read as 0 so far; None if these values are refused."""

    @property
    def path(self) -> Path:
        return self.identity.path

    @cached_property
    def nbytes(self) -> int:
        """The bytes of all tensors in the dtypes in which they are read."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def stored(self) -> str:
        """The storage format of most elements: see `SourceTensor.stored`."""
        elements: Counter[str] = Counter()
        for tensor in self.tensors.values():
            elements[tensor.stored] += math.prod(tensor.shape)
        return elements.most_common(1)[0][0]

    @property
    def quantized_formats(self) -> tuple[str, ...]:
        """The storage formats of tensors that are quantized already; quantizing them again adds a second error."""
        return tuple(sorted({tensor.stored for tensor in self.tensors.values()} - {"F32", "F16", "BF16", *NUMBERS}))

    def check_complete(self) -> None:
        """Raise QuantError if the model lacks a tensor that it must have."""
        check_complete(self.path, self.tensors.keys(), self.architecture, add_on=is_add_on(self.tensors.keys(), ""))

    @property
    def warnings(self) -> list[str]:
        """What to tell the user: models that are left out, or fewer blocks than the published models have."""
        return [*self.left_out, *few_blocks(self.path, self.tensors, self.architecture)]

    def allowing_non_finite(self) -> Checkpoint:
        """Return this checkpoint with 0 in place of NaN and infinity."""
        zeroed: set[str] = set()
        return replace(self, tensors={n: FiniteTensor.of(t, zeroed) for n, t in self.tensors.items()}, zeroed=zeroed)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.files.close()


def open_checkpoint(path: str | Path, add_ons: Sequence[str | Path] = (), loras: Sequence[LoRA] = ()) -> Checkpoint:
    """Open a Wan transformer, an add-on for one, or a T5 text encoder.

    Args:
        path: a safetensors file (plain, FP8, or in ComfyUI's quantized formats), a folder of shards, their index, one
            of the shards, or a GGUF.
        add_ons: add-on files (VACE and the like) whose tensors are merged onto the checkpoint's.
        loras: LoRAs that are added to the weights, in this order.

    Raises:
        QuantError: no such file, a pickle, a damaged or missing file, another model, an unsupported format, or a LoRA
            that does not fit.
    """
    base = _open(Path(path))
    try:
        for add_on in add_ons:
            base = _merged(base, _open(Path(add_on)))
        if loras:
            base = with_loras(base, loras)
    except BaseException:
        base.files.close()
        raise
    return base


def with_loras(base: Checkpoint, loras: Sequence[LoRA]) -> Checkpoint:
    """Return a checkpoint with LoRAs added to its weights, which are float32 then.

    Raises:
        QuantError: see `bake`.
    """
    baked = bake(base.path, base.tensors, loras)
    parts = tuple(file.identity for file in baked.files)
    return replace(
        base,
        identity=replace(base.identity, parts=base.identity.parts + parts),
        tensors=baked.tensors,
        files=SourceFiles([*base.files.parts, *baked.files]),
        held_bytes=base.held_bytes + baked.held_bytes,
        left_out=(*base.left_out, *baked.warnings),
        loras=(*base.loras, *loras),
        notes=(*base.notes, *baked.notes),
    )


def _open(path: Path) -> Checkpoint:
    return checkpoint_of(path, open_files(path), find_naming)


def checkpoint_of(path: Path, opened: OpenedFiles, find: Callable[[Path, Collection[str]], Naming]) -> Checkpoint:
    """Return the checkpoint in opened files, which are closed if there is none.

    Args:
        path: the path of the files.
        opened: what `open_files` returned for it.
        find: the function that returns the naming of the tensors for the path and their names.

    Raises:
        QuantError: as for `open_checkpoint`.
    """
    files = SourceFiles(opened.files)
    try:
        naming = find(path, {tensor.name for tensor in opened.tensors})
        # In safetensors, preferences are tensors; a text of such a name is something else.
        metadata = source_metadata(opened.metadata) if opened.is_gguf else without_preferences(opened.metadata)
        stored, preferences = take_preferences(model_tensors(naming, opened.tensors))
        metadata |= preferences
        formats = _by_new_name(declared_formats(path, metadata), stored)
        metadata.pop(QUANTIZATION_METADATA, None)
        doubts = contradiction(list(stored.values()), formats)
        weights = source_tensors(list(stored.values()), formats)
        tensors = {tensor.name: tensor for tensor in with_joined_halves(weights, joined_tensor)}
        gguf_metadata = _gguf_metadata(path, opened, tensors) if naming.architecture == T5 else {}
    except BaseException:
        files.close()
        raise
    identity = SourceIdentity(path, tuple(file.identity for file in opened.files))
    left_out = (*((naming.warning,) if naming.warning else ()), *doubts)
    return Checkpoint(
        identity, path.name, metadata, naming.architecture, gguf_metadata, tensors, files, left_out=left_out
    )


def _merged(base: Checkpoint, add_on: Checkpoint) -> Checkpoint:
    try:
        check_add_on(base, add_on)
        check_has_layers(base, add_on)
    except QuantError:
        add_on.files.close()
        raise
    return replace(
        base,
        identity=replace(base.identity, parts=base.identity.parts + add_on.identity.parts),
        name=f"{base.name} + {add_on.name}",
        metadata={**add_on.metadata, **base.metadata},
        tensors={**base.tensors, **add_on.tensors},
        files=SourceFiles([*base.files.parts, *add_on.files.parts]),
    )


def _gguf_metadata(path: Path, opened: OpenedFiles, tensors: Mapping[str, SourceTensor]) -> dict[str, Any]:
    check_complete(path, tensors.keys(), T5)
    stored = next(((tensor.dtype, tensor.peek()) for tensor in opened.tensors if is_tokenizer(tensor.name)), None)
    metadata = opened.metadata if opened.is_gguf else {}
    return t5_metadata(path, {name: tensor.shape for name, tensor in tensors.items()}, metadata, stored)


def _by_new_name(formats: Mapping[str, LayerFormat], stored: Mapping[str, StoredTensor]) -> dict[str, LayerFormat]:
    # ComfyUI reads the names in the metadata both with and without the prefix.
    weights = {name.removesuffix(".weight"): tensor.name.removesuffix(".weight") for name, tensor in stored.items()}
    return {weights.get(layer, layer): config for layer, config in formats.items()}
