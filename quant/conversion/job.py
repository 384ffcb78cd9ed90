"""One file to make: what it is made from and how, as the metadata that identifies it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import QuantError
from ..gguf.header import read_header
from ..gguf.provenance import (
    DATA_SHA256,
    FIVE_D,
    NON_FINITE,
    RELATIVE_ERROR,
    SOURCE_MTIME,
    SOURCE_SHA256,
    TARGET_SIZE,
    VERSION,
    carried_metadata,
    fingerprint,
    is_same_job,
)
from ..inspection.report import GIB
from ..plan.recipe import find_recipe
from ..qtype import Effort
from ..sources.checkpoint import Checkpoint
from ..sources.opening import shard_of
from ..statistics.importance import Importance

# LLAMA_FTYPE_GUESSED of llama.cpp's include/llama.h: the tensors tell.
_MIXED = 1024


@dataclass(frozen=True)
class Job:
    """A file to make; a target size in GiB counts instead of the recipe."""

    destination: Path
    recipe: str = "Q4_K_M"
    target_size: float | None = None

    @property
    def target_bytes(self) -> int:
        """0 without a target."""
        if self.target_size is None:
            return 0
        if not 0 < self.target_size < math.inf:
            raise QuantError(f"target size {self.target_size} GiB: not a size; choose one above 0")
        return int(self.target_size * GIB)


def job_metadata(
    checkpoint: Checkpoint, job: Job, effort: Effort, importance: Mapping[str, Tensor] | None, five_d: bool
) -> dict[str, Any]:
    """All metadata of the file; the last three values are placeholders until every tensor is written."""
    recipe = find_recipe(job.recipe)
    return {
        "general.architecture": checkpoint.architecture,
        "general.quantization_version": 2,
        "general.file_type": _MIXED if job.target_bytes else recipe.file_type,
        "general.name": shard_of(checkpoint.path)[0],
        "wanquant.version": VERSION,
        "wanquant.recipe": "" if job.target_bytes else recipe.name,
        TARGET_SIZE: np.uint64(job.target_bytes),
        "wanquant.effort": effort,
        "wanquant.importance": fingerprint(importance),
        FIVE_D: five_d,
        "wanquant.source_name": checkpoint.name,
        "wanquant.source_size": np.uint64(checkpoint.identity.size),
        "wanquant.source_dtype": checkpoint.stored,
        **checkpoint.gguf_metadata,
        **carried_metadata(checkpoint.metadata),
        **({} if checkpoint.zeroed is None else {NON_FINITE: True}),
        **(importance.metadata if isinstance(importance, Importance) else {}),
        SOURCE_MTIME: np.int64(checkpoint.identity.mtime_ns),
        SOURCE_SHA256: "0" * 64,
        DATA_SHA256: "0" * 64,
        RELATIVE_ERROR: np.zeros(len(checkpoint.tensors), np.float32),
    }


def is_up_to_date(destination: Path, checkpoint: Checkpoint, job: Mapping[str, Any]) -> bool:
    """Whether the file there is the result of this very job."""
    try:
        existing = read_header(destination).metadata
    except QuantError:
        return False
    if not is_same_job(existing, job):
        return False
    # A copied or touched source has another time but the same content; one in memory has no time.
    return (
        existing.get(SOURCE_MTIME) == int(job[SOURCE_MTIME]) != 0
        or existing.get(SOURCE_SHA256) == checkpoint.file.sha256()
    )
