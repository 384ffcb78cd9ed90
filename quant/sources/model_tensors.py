"""The tensors of a file under the names and in the shapes that ComfyUI's model has, or llama.cpp's for an encoder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

from ..gguf.header import TensorRecord
from ..gguf.reader import GGUFFile, GGUFTensor, open_gguf
from .host_shapes import host_shape
from .names import WAN, Naming, known_naming
from .tensors import StoredTensor

_Stored = TypeVar("_Stored", StoredTensor, TensorRecord, GGUFTensor)


def model_tensors(naming: Naming, tensors: Iterable[_Stored]) -> dict[str, _Stored]:
    """Return the model's tensors, renamed and reshaped, by their names in the file.

    Tensors that are not the model's are left out.

    Raises:
        QuantError: a name that has no counterpart in ComfyUI.
    """
    named: dict[str, _Stored] = {}
    taken = set()
    for tensor in tensors:
        name = naming.new_name(tensor.name)
        # Transformers writes a tied embedding several times, under each of its names.
        if name is not None and name not in taken:
            taken.add(name)
            named[tensor.name] = replace(tensor, name=name)
    if naming.architecture != WAN:
        return named
    shapes = {tensor.name: tensor.shape for tensor in named.values()}
    return {stored: replace(t, shape=host_shape(t.name, shapes)) for stored, t in named.items()}


def open_model(path: str | os.PathLike[str]) -> GGUFFile:
    """Map a GGUF as `open_gguf` does, with the names and shapes of `model_tensors` if it is a model that is known.

    Raises:
        QuantError: as for `open_gguf` and `known_naming`.
    """
    file = open_gguf(path)
    naming = known_naming(file.path, file.tensors)
    if naming is None:
        return file
    tensors = model_tensors(naming, file.tensors.values()).values()
    return replace(file, tensors={tensor.name: tensor for tensor in tensors})
