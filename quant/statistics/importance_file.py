"""Files of importance matrices: llama.cpp's GGUF layout, and the .dat that came before it (read only).

Source: llama.cpp tools/imatrix/imatrix.cpp @ 050fc7f, IMatrixCollector::save_imatrix and save_imatrix_legacy;
the prefix: stable-diffusion.cpp src/runtime/imatrix.cpp @ 97d2990.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import QuantError
from ..gguf.layout import TensorSpec
from ..gguf.reader import open_gguf
from ..gguf.writer import GGUFWriter
from ..qtype import QTYPES
from .importance import Importance

_SUMS, _COUNTS = ".in_sum2", ".counts"
_PREFIX = "model.diffusion_model."
_MAX_NAME_BYTES = 1 << 10
_MAX_LEGACY_BYTES = 1 << 28


def write_importance(path: str | Path, importance: Importance, *, overwrite: bool = False) -> Path:
    """Writes two F32 tensors a layer, `<weight>.in_sum2` (1, columns) and `<weight>.counts` (1, 1).

    Returns:
        The file's path, which can differ from the one asked for: see `AtomicFile.commit`.
    """
    rows = max(importance.counts.values(), default=0.0) / max(1, importance.samples)
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": importance.datasets,
        "imatrix.chunk_count": importance.samples,
        "imatrix.chunk_size": max(1, round(rows)),
    }
    values = {}
    for name in sorted(importance):
        values[name + _SUMS] = importance.sums[name].float()
        values[name + _COUNTS] = torch.tensor([float(importance.counts[name])])
    specs = [TensorSpec(name, QTYPES["F32"], (1, len(tensor))) for name, tensor in values.items()]
    with GGUFWriter(path, metadata, specs, overwrite=overwrite) as writer:
        for name, tensor in values.items():
            writer.write(name, tensor.contiguous().view(torch.uint8))
        return writer.close()


def read_importance(path: str | Path) -> Importance:
    """Reads either layout; the prefix that stable-diffusion.cpp gives the names is taken off.

    Raises:
        QuantError: not an importance matrix, or one with a layer that was never run, NaN, or a negative sum.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(4)
            is_gguf = content == b"GGUF"
            content += b"" if is_gguf else file.read(_MAX_LEGACY_BYTES)
        importance = _read_gguf(path) if is_gguf else _read_legacy(path, content)
    except OSError as error:
        raise QuantError(f"{path}: cannot be read ({error.strerror}); give the path of an importance matrix") from None
    for name, sums in importance.sums.items():
        if not importance.counts[name] > 0:
            raise QuantError(f"{path}: tensor {name}: its count is {importance.counts[name]:g}; collect it again")
        if not (sums.isfinite().all() and (sums >= 0).all()):
            raise QuantError(f"{path}: tensor {name}: holds NaN, infinity or a negative sum; collect it again")
    return importance


def _read_gguf(path: Path) -> Importance:
    file = open_gguf(path)
    sums = {_weight(name, _SUMS): tensor for name, tensor in file.tensors.items() if name.endswith(_SUMS)}
    counts = {_weight(name, _COUNTS): tensor for name, tensor in file.tensors.items() if name.endswith(_COUNTS)}
    if not sums:
        raise QuantError(f"{path}: no importance matrix (no tensor *{_SUMS}); collect one, or take llama-imatrix's")
    for name in {**sums, **counts}:
        is_pair = name in sums and name in counts
        if not is_pair or math.prod(counts[name].shape) != 1 or math.prod(sums[name].shape[:-1]) != 1:
            raise QuantError(f"{path}: tensor {name}: expected one row of sums and one count; collect it again")
    return Importance(
        {name: tensor.dequantize().flatten() for name, tensor in sums.items()},
        {name: tensor.dequantize().item() for name, tensor in counts.items()},
        int(file.metadata.get("imatrix.chunk_count", 0)),
        path.name,
        tuple(file.metadata.get("imatrix.datasets", ())),
    )


def _read_legacy(path: Path, content: bytes) -> Importance:
    sums: dict[str, Tensor] = {}
    counts: dict[str, float] = {}
    try:
        (entries,), at = struct.unpack_from("<i", content), 4
        for _ in range(entries):
            (length,), at = struct.unpack_from("<i", content, at), at + 4
            if not 0 < length <= _MAX_NAME_BYTES:
                raise ValueError(f"a name of {length} bytes")
            name, at = _weight(content[at : at + length].decode(), ""), at + length
            (calls, columns), at = struct.unpack_from("<iI", content, at), at + 8
            sums[name] = torch.from_numpy(np.frombuffer(content, "<f4", columns, at).astype(np.float32))
            counts[name], at = calls, at + 4 * columns
    except (struct.error, ValueError) as error:
        raise QuantError(f"{path}: neither a GGUF nor a whole .dat importance matrix ({error})") from None
    if not sums:
        raise QuantError(f"{path}: no importance matrix, it has no entries; collect one, or take llama-imatrix's")
    return Importance(sums, counts, int(max(counts.values())), path.name)


def _weight(name: str, suffix: str) -> str:
    return name.removesuffix(suffix).removeprefix(_PREFIX)
