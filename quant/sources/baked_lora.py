"""LoRAs that are added to the weights of a source before these are quantized.

Only the sum of the weight at hand is in memory.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..errors import QuantError
from ..units import counted
from .files import HashedFile
from .lora_file import LoRATensor, open_lora
from .lora_patches import Patch, found_patches
from .tensors import SourceTensor

_STRENGTH = re.compile(r"(?P<file>.+):(?P<strength>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)")
_NAMED = 3
"""How many names a message has; it counts the others."""


class LoRA(NamedTuple):
    """A LoRA file, and how strongly it changes the weights."""

    path: Path
    strength: float = 1.0

    @classmethod
    def of(cls, given: LoRALike) -> LoRA:
        """Return the LoRA of a path, or of a text FILE or FILE:STRENGTH, or of a pair of path and strength.

        The strength of a text is what follows the last colon, if that is a number.

        Raises:
            QuantError: a strength that is not finite.
        """
        if isinstance(given, tuple):
            lora = cls(Path(given[0]), float(given[1]))
        elif isinstance(given, str) and (match := _STRENGTH.fullmatch(given)):
            lora = cls(Path(match["file"]), float(match["strength"]))
        else:
            lora = cls(Path(given))
        if not math.isfinite(lora.strength):
            raise QuantError(f"LoRA {lora.path}: strength {lora.strength}, expected a finite number; give another")
        return lora

    def __str__(self) -> str:
        return f"{self.path.name}:{self.strength!r}"


LoRALike: TypeAlias = "str | os.PathLike[str] | tuple[str | os.PathLike[str], float]"


class _Latest:
    """The sum of a weight and its LoRAs; only that of the latest weight is kept."""

    def __init__(self) -> None:
        self._name, self._values = "", torch.empty(0)

    def values(self, tensor: BakedTensor) -> Tensor:
        """Return all values of a tensor, float32, flat."""
        if self._name != tensor.name:
            self._name, self._values = "", torch.empty(0)
            weight = tensor.tensor.read().float().view(tensor.shape)
            for strength, patch in tensor.patches:
                patch.add(weight, strength)
            self._name, self._values = tensor.name, weight.flatten()
        return self._values


@dataclass(frozen=True)
class BakedTensor(SourceTensor):
    """A weight or bias in float32 with LoRAs added to it."""

    tensor: SourceTensor
    patches: tuple[tuple[float, Patch], ...] = field(repr=False)
    latest: _Latest = field(repr=False, compare=False)

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        return self.latest.values(self)[start : self._stop(stop)]


class Baked(NamedTuple):
    """The tensors of a model with LoRAs added, and what else there is to know."""

    tensors: dict[str, SourceTensor]
    files: list[HashedFile]
    """The open files of the LoRAs."""
    held_bytes: int
    """The most bytes of main memory that a sum needs in addition to the values that are read."""
    notes: tuple[str, ...]
    """Sentences on what was baked."""
    warnings: tuple[str, ...]
    """Sentences on parts of the LoRAs that do not fit the model."""


def bake(path: Path, tensors: Mapping[str, SourceTensor], loras: Sequence[LoRA]) -> Baked:
    """Return the tensors of a model, by ComfyUI's names without prefix, with LoRAs added.

    Args:
        path: the source, for messages.

    Raises:
        QuantError: a file that is not a LoRA, another kind than plain factors and differences, a damaged LoRA, or one
            of which nothing fits the model.
    """
    files: list[HashedFile] = []
    patches: dict[str, list[tuple[float, Patch]]] = {}
    notes, warnings = [], []
    try:
        for lora in loras:
            file = open_lora(lora.path)
            files += file.files
            found, left_out = _fitting(path, lora.path, file.tensors, tensors)
            warnings += left_out
            for name, patch in found.items():
                patches.setdefault(name, []).append((lora.strength, patch))
            notes.append(
                f"{lora.path.name} at strength {lora.strength:g} is baked into {counted(len(found), 'tensor')}, before"
                " rounding; load the file without this LoRA"
            )
    except BaseException:
        for opened in files:
            opened.close()
        raise
    latest = _Latest()
    baked = {
        name: BakedTensor(name, torch.float32, tensor.shape, tensor.stored, tensor, tuple(patches[name]), latest)
        if name in patches
        else tensor
        for name, tensor in tensors.items()
    }
    # The sum and one product.
    held = max((8 * math.prod(tensors[name].shape) for name in patches), default=0)
    return Baked(baked, files, held, tuple(notes), tuple(warnings))


def _fitting(
    source: Path, path: Path, lora: Mapping[str, LoRATensor], model: Mapping[str, SourceTensor]
) -> tuple[dict[str, Patch], list[str]]:
    """Return the patches of a LoRA by the model's names, and warnings of what does not fit the model."""
    found, used = found_patches(path, lora, model)
    problems = {name: problem for name, patch in found.items() if (problem := patch.problem(model[name].shape))}
    fitting = {name: patch for name, patch in found.items() if name not in problems}
    unknown = [name for name in lora if name not in used]
    if not fitting:
        what = f"none of its tensors fits ({_list(f'{n} {p}' for n, p in problems.items()) or _list(unknown)})"
        raise QuantError(f"{path}: a LoRA for another model than {source.name}: {what}; choose a LoRA for this model")
    warnings = []
    if problems:
        named = _list(f"{name} {problem}" for name, problem in problems.items())
        what = counted(len(problems), "patch that does not fit", "patches that do not fit")
        warnings.append(f"{path.name}: left out {what}: {named}")
    if unknown:
        warnings.append(
            f"{path.name}: left out {counted(len(unknown), 'tensor')} whose names are not in {source.name}:"
            f" {_list(unknown)}"
        )
    return fitting, warnings


def _list(names: Iterator[str] | Sequence[str]) -> str:
    named = [f"{name:.100}" for name in names]
    return ", ".join(named[:_NAMED]) + (f" and {len(named) - _NAMED} more" if len(named) > _NAMED else "")
