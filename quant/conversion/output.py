"""One output file of a conversion, with the metadata that identifies how it is made."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import PrintableLog, QuantError
from ..files.disk_space import temporary_of
from ..files.journal import journal_of
from ..files.regular_file import check_path
from ..files.sentencepiece import has_tokenizer, sentencepiece_model
from ..files.tensor_writer import TensorWriter
from ..gguf.layout import TensorSpec
from ..gguf.provenance import (
    CALIBRATED,
    CORRECTED_BIASES,
    DATA_SHA256,
    FIVE_D,
    LORAS,
    NON_FINITE,
    RELATIVE_ERROR,
    SOURCE_MTIME,
    SOURCE_PARTS,
    SOURCE_SHA256,
    TARGET_SIZE,
    TOKENIZER,
    TUNED,
    VERSION,
    carried_metadata,
    encoder_revisions,
    encoders,
    fingerprint,
    is_same_conversion,
    records_same,
)
from ..gguf.writer import GGUFWriter
from ..plan.recipe import TypePlan, find_recipe
from ..qtype import QuantType
from ..safetensors.header import AnyHeader, read_any_header
from ..safetensors.layout import NativeSpec, PlainBytes, SafetensorsLayout
from ..sources.checkpoint import Checkpoint
from ..sources.opening import shard_of
from ..sources.t5 import SPIECE_TENSOR, transformers_name
from ..statistics.calibration import Calibration
from ..statistics.importance import Importance
from .bias_correction import corrected_biases
from .layer_encoder import revisions_today
from .settings import Settings, Target

_log = PrintableLog(__name__)

# LLAMA_FTYPE_GUESSED of llama.cpp's include/llama.h: a reader finds the types in the tensors.
_MIXED = 1024


@dataclass(frozen=True)
class Output:
    """An output file of a conversion."""

    target: Target
    metadata: Mapping[str, Any]
    reused: bool
    """True if the file exists already, made from the same source with the same settings."""
    older: tuple[str, ...] = ()
    """The types in a reused file whose encoders write other bytes today."""

    @classmethod
    def of(cls, target: Target, checkpoint: Checkpoint, settings: Settings) -> Output:
        """Return the output for a target, after a check of what exists at its destination.

        Raises:
            QuantError: an unusable destination, recipe or size, or another file exists and must not be replaced.
        """
        path = target.destination
        _check_paths(checkpoint, target)
        metadata = _metadata(target, checkpoint, settings)
        exists = path.exists()
        existing = _header_of_same(target, metadata, checkpoint) if exists else None
        if exists and existing is None and not settings.overwrite:
            raise QuantError(
                f"{path}: exists, but is not this conversion of {checkpoint.name}: its source or settings differ;"
                " choose another name, or allow overwriting"
            )
        older = () if existing is None else _older_types(existing, metadata)
        reused = existing is not None and not (older and settings.overwrite)
        return cls(target, metadata, reused, older if reused else ())

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on a reused file of older encoders, and on an experimental recipe."""
        name, recipe, notes = self.target.destination.name, find_recipe(self.target.recipe), []
        if self.older:
            notes.append(
                f"{name} is used as it is: it was made by an older encoder of {', '.join(self.older)}; turn overwrite"
                " on to make it anew"
            )
        if recipe.experimental and not self.target.target_bytes:
            notes.append(
                f"{name}: {recipe.name} is experimental: its errors are large, and no real model of it has been judged"
            )
        return tuple(notes)

    def writer(self, plan: TypePlan, checkpoint: Checkpoint, settings: Settings) -> TensorWriter[Any]:
        """Return a writer of the file, which continues an unfinished conversion if there is one."""
        path, shapes = self.target.destination, checkpoint.tensors
        if path.exists() and not _is_replaceable(path):
            _log.warning(
                "%s is in use by a program and cannot be replaced; the new file gets another name in the same folder",
                path,
            )
        # A source in memory has no modification time that distinguishes it from another one. And which tensors hold NaN
        # or infinity is only known after all of them were read.
        resume = int(self.metadata[SOURCE_MTIME]) != 0 and checkpoint.zeroed is None
        # A calibrated rounding takes hours. Whoever interrupts a quicker one mostly wants other settings.
        keep = resume and isinstance(settings.importance, Calibration)
        how = {"overwrite": settings.overwrite, "resume": resume, "keep": keep}
        if self.target.is_native:
            native = [
                NativeSpec(name, stored, shapes[name].shape, transformers_name(name))
                for name, stored in plan.types.items()
            ]
            if spiece := tokenizer_of(checkpoint):
                native.append(NativeSpec(SPIECE_TENSOR, PlainBytes(), (len(spiece),)))
            layout = SafetensorsLayout(path, self.metadata, native)
            return TensorWriter(layout, ending=spiece, **how)
        specs = [
            TensorSpec(name, stored, shapes[name].shape)
            for name, stored in plan.types.items()
            if isinstance(stored, QuantType)
        ]
        return GGUFWriter(path, self.metadata, specs, five_d=settings.five_d, **how)


def _metadata(target: Target, checkpoint: Checkpoint, settings: Settings) -> dict[str, Any]:
    """Return the metadata of the file; its last three values are placeholders until all tensors are written."""
    recipe, importance, tensors = find_recipe(target.recipe), settings.importance, checkpoint.tensors
    return {
        "general.architecture": checkpoint.architecture,
        "general.quantization_version": 2,
        "general.file_type": _MIXED if target.target_bytes else recipe.file_type,
        "general.name": shard_of(checkpoint.path)[0],
        "wanquant.version": VERSION,
        "wanquant.recipe": "" if target.target_bytes and not target.is_native else recipe.name,
        TARGET_SIZE: np.uint64(target.target_bytes),
        "wanquant.effort": settings.effort,
        "wanquant.importance": fingerprint(importance),
        **encoders(revisions_today(importance, tuned=bool(settings.tuned))),
        **({CORRECTED_BIASES: biases} if (biases := list(corrected_biases(settings, tensors).values())) else {}),
        **({LORAS: [str(lora) for lora in checkpoint.loras]} if checkpoint.loras else {}),
        FIVE_D: settings.five_d,
        "wanquant.source_name": checkpoint.name,
        "wanquant.source_size": np.uint64(checkpoint.identity.size),
        "wanquant.source_dtype": checkpoint.stored,
        **(_of_tokenizer(checkpoint) if target.is_native else checkpoint.gguf_metadata),
        **carried_metadata(checkpoint.metadata),
        **({} if checkpoint.zeroed is None else {NON_FINITE: True}),
        **({TUNED: settings.tuned, CALIBRATED: True} if settings.tuned else {}),
        **(importance.metadata if isinstance(importance, Importance) else {}),
        SOURCE_MTIME: np.int64(checkpoint.identity.mtime_ns),
        **({SOURCE_PARTS: parts} if (parts := checkpoint.identity.digest) else {}),
        SOURCE_SHA256: "0" * 64,
        DATA_SHA256: "0" * 64,
        RELATIVE_ERROR: np.zeros(len(tensors), np.float32),
    }


def tokenizer_of(checkpoint: Checkpoint) -> bytes:
    """Return the sentencepiece model of a text encoder, empty for another model."""
    return sentencepiece_model(checkpoint.gguf_metadata) if has_tokenizer(checkpoint.gguf_metadata) else b""


def _of_tokenizer(checkpoint: Checkpoint) -> dict[str, Any]:
    spiece = tokenizer_of(checkpoint)
    return {TOKENIZER: hashlib.sha256(spiece).hexdigest()} if spiece else {}


def _header_of_same(target: Target, metadata: Mapping[str, Any], checkpoint: Checkpoint) -> AnyHeader | None:
    """Return the header of the existing file if the file is the result of the same conversion."""
    try:
        header = read_any_header(target.destination)
    except QuantError:
        return None
    existing = header.metadata
    if not is_same_conversion(existing, metadata):
        return None
    has_time = int(metadata[SOURCE_MTIME]) != 0
    is_untouched = has_time and records_same(existing, metadata, SOURCE_MTIME, SOURCE_PARTS)
    # A copied or touched source has another modification time but the same content; one in memory has none.
    is_same = is_untouched or records_same(existing, {SOURCE_SHA256: checkpoint.files.sha256()}, SOURCE_SHA256)
    return header if is_same else None


def _older_types(existing: AnyHeader, metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the types of a file whose encoders have a higher revision today, sorted."""
    recorded, today = encoder_revisions(existing.metadata), encoder_revisions(metadata)
    stored = {tensor.stored for tensor in existing.tensors.values()}
    return tuple(sorted(name for name in stored if today.get(name, 0) > recorded.get(name, 0)))


def _check_paths(checkpoint: Checkpoint, target: Target) -> None:
    destination, suffix = target.destination, target.suffix
    check_path(destination, temporary_of(destination), journal_of(destination))
    if destination.suffix.lower() != suffix:
        what = "" if target.target_size is not None and not target.is_native else f", which {target.recipe} writes"
        raise QuantError(f"{destination}: not a {suffix} name{what}; choose a destination that ends in {suffix}")
    # Shards, add-ons and LoRAs are parts, too.
    sources = (part.path for part in checkpoint.identity.parts)
    if destination.exists() and any(path.exists() and path.samefile(destination) for path in sources):
        raise QuantError(f"{destination}: is the source itself or a part of it; choose another destination")


def _is_replaceable(path: Path) -> bool:
    """Return whether the file can be replaced; Windows refuses that while a program has it mapped."""
    try:
        os.replace(path, path)
    except PermissionError:
        return False
    return True
