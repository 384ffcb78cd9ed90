"""JSON texts that a checkpoint stores as tensors of bytes."""

from __future__ import annotations

from typing import Any

from ..errors import QuantError
from ..files.strict_json import parse_json
from .tensors import StoredTensor

MAX_BYTES = 1 << 16
"""The most bytes of a text; real ones have up to 200."""


def read_json(tensor: StoredTensor, kind: str) -> tuple[str, Any]:
    """Return a text and its value.

    Args:
        tensor: U8 or I8 of any shape.
        kind: what ComfyUI writes there, for messages.

    Raises:
        QuantError: another dtype, more than `MAX_BYTES`, or not JSON.
    """
    where, advice = f"{tensor.file.path}: tensor {tensor.name}", "the file is damaged, download it again"
    if tensor.dtype not in ("U8", "I8") or not 0 < tensor.nbytes <= MAX_BYTES:
        raise QuantError(
            f"{where}: {tensor.nbytes} bytes of {tensor.dtype}, expected {kind} in 1 to {MAX_BYTES} bytes of U8;"
            f" {advice}"
        )
    data = tensor.peek().numpy().tobytes()
    value = parse_json(data, f"{where}: expected {kind}, but it", advice)
    return data.decode(), value
