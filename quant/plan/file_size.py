"""The exact size of a GGUF file before it is written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..gguf.header import DEFAULT_ALIGNMENT
from ..gguf.layout import FileLayout, TensorSpec
from ..qtype import QuantType
from .recipe import TensorInfo


def predicted_size(
    types: Mapping[str, QuantType],
    tensors: Mapping[str, TensorInfo],
    metadata: Mapping[str, Any] | None = None,
    *,
    five_d: bool = False,
) -> int:
    """Return the size in bytes of the GGUF file that holds these tensors and this metadata."""
    specs = [TensorSpec(name, qtype, tensors[name].shape) for name, qtype in types.items()]
    return FileLayout("unwritten.gguf", metadata or {}, specs, five_d=five_d).nbytes


def padded_bytes(qtype: QuantType, tensor: TensorInfo) -> int:
    """Return the bytes of one tensor in a file, including the padding in front of the next tensor."""
    nbytes = math.prod(qtype.packed_shape(tensor.shape))
    return -(-nbytes // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def header_bytes(
    types: Mapping[str, QuantType], tensors: Mapping[str, TensorInfo], metadata: Mapping[str, Any], *, five_d: bool
) -> int:
    """Return the bytes in front of the tensors, which do not depend on their types."""
    data = sum(padded_bytes(qtype, tensors[name]) for name, qtype in types.items())
    return predicted_size(types, tensors, metadata, five_d=five_d) - data
