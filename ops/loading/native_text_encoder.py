"""Text encoders in safetensors through the host's own loader, and in GGUF through this pack's."""

from __future__ import annotations

import os
from pathlib import Path

import comfy.sd
import torch

from ...quant.files.safetensors_header import read_safetensors_header
from .by_host import built_by_host
from .text_encoder import check_family, load_text_encoder

SUFFIX = ".safetensors"


def load_any_text_encoder(
    path: str | os.PathLike[str],
    clip_type: comfy.sd.CLIPType,
    embedding_directory: list[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> comfy.sd.CLIP:
    """Load a T5 text encoder from a GGUF or a safetensors file; the suffix of the name tells which it is.

    Args:
        path: the file; of a split GGUF, any part.
        clip_type: the model family that the prompt is for, which decides on tokenizer and padding.
        embedding_directory: folders of textual inversion embeddings.
        dtype: the dtype of matrix products; if None, float32 for a GGUF, and what the host chooses for safetensors.

    Raises:
        QuantError: as `load_text_encoder` raises it, or a malformed safetensors file, or one that the host cannot load.
    """
    path = Path(path)
    if path.suffix.lower() != SUFFIX:
        return load_text_encoder(path, clip_type, embedding_directory, dtype=dtype)
    _, entries = read_safetensors_header(path)
    check_family(path, {entry.name for entry in entries}, clip_type)
    options = {} if dtype is None else {"dtype": dtype}
    with built_by_host(path, "load this text encoder"):
        return comfy.sd.load_clip([str(path)], embedding_directory, clip_type, options)
