"""The request for a conversion: the files to make, and the settings that they have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import QuantError
from ..plan.recipe import find_recipe
from ..qtype import Effort
from ..sources.baked_lora import LoRA
from ..units import GIB


@dataclass(frozen=True)
class Target:
    """A file to make: its path, and a recipe or a size.

    With a size, a native recipe says which types may be mixed: those that load wherever it does.
    """

    destination: Path
    recipe: str = "Q4_K_M"
    target_size: float | None = None
    """The largest size of the file in GiB."""

    @property
    def mark(self) -> str:
        """What tells the file from others of the same source, for its name."""
        if self.target_size is None:
            return self.recipe
        return f"{self.recipe}-{self.target_size:g}GiB" if self.is_native else f"{self.target_size:g}GiB"

    @property
    def is_native(self) -> bool:
        """True if the file is a safetensors in one of ComfyUI's own formats."""
        return find_recipe(self.recipe).is_native

    @property
    def suffix(self) -> str:
        """The suffix that the destination must have."""
        return ".safetensors" if self.is_native else ".gguf"

    @property
    def target_bytes(self) -> int:
        """The target size in bytes; 0 for a recipe."""
        if self.target_size is None:
            return 0
        if not 0 < self.target_size < math.inf:
            raise QuantError(f"target size {self.target_size} GiB: not a size; choose a finite number above 0")
        return int(self.target_size * GIB)


@dataclass(frozen=True)
class Settings:
    """The settings of all files of a conversion; most are the arguments of `convert`, which documents them."""

    effort: Effort = "best"
    importance: Mapping[str, Tensor] | None = None
    device: str | torch.device = "cpu"
    overwrite: bool = False
    five_d: bool = False
    allow_non_finite: bool = False
    add_ons: Sequence[str | Path] = ()
    loras: Sequence[LoRA] = ()
    tuned: str = ""
    """The SHA-256 of the capture that the file is tuned with; empty in a conversion."""
