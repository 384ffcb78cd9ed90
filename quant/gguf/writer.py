"""GGUFWriter, which writes a GGUF file tensor by tensor; the destination appears complete or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..files.tensor_writer import TensorWriter
from .layout import FileLayout, TensorSpec


class GGUFWriter(TensorWriter[TensorSpec]):
    """A `TensorWriter` of a GGUF file.

    Args:
        five_d: see `FileLayout`.
        others: see `TensorWriter`.

    Raises:
        QuantError: a name, a shape or a metadata value cannot be stored; on entering, also what `TensorWriter` raises.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        metadata: Mapping[str, Any],
        tensors: Sequence[TensorSpec],
        *,
        overwrite: bool = False,
        five_d: bool = False,
        resume: bool = False,
        keep: bool = False,
    ) -> None:
        layout = FileLayout(path, metadata, tensors, five_d=five_d)
        super().__init__(layout, overwrite=overwrite, resume=resume, keep=keep)
