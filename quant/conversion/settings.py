"""What a conversion is asked for: the files to make, and the settings that these have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import QuantError
from ..qtype import Effort
from ..units import GIB


@dataclass(frozen=True)
class Target:
    """A file to make: where, and by which recipe or for which size."""

    destination: Path
    recipe: str = "Q4_K_M"
    target_size: float | None = None
    """GiB; counts instead of the recipe."""

    @property
    def target_bytes(self) -> int:
        """The size in bytes; 0 for a recipe."""
        if self.target_size is None:
            return 0
        if not 0 < self.target_size < math.inf:
            raise QuantError(f"target size {self.target_size} GiB: not a size; choose one above 0")
        return int(self.target_size * GIB)


@dataclass(frozen=True)
class Settings:
    """How all files of a conversion are made; `convert` says what each means."""

    effort: Effort = "best"
    importance: Mapping[str, Tensor] | None = None
    device: str | torch.device = "cpu"
    overwrite: bool = False
    five_d: bool = False
    allow_non_finite: bool = False
    add_ons: Sequence[str | Path] = ()
