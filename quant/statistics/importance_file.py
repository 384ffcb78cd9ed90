"""Files of importance matrices: llama.cpp's GGUF layout, and its older .dat layout, which is only read.

Source: llama.cpp tools/imatrix/imatrix.cpp @ 050fc7f, IMatrixCollector::save_imatrix and save_imatrix_legacy;
for the prefix of the names, stable-diffusion.cpp src/runtime/imatrix.cpp @ 97d2990.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import QuantError
from ..files.regular_file import open_regular
from ..files.safetensors_header import MAX_ITEMS
from ..files.typed_metadata import TypedMetadata
from ..gguf.layout import TensorSpec
from ..gguf.reader import GGUFTensor, open_gguf
from ..gguf.writer import GGUFWriter
from ..qtype import QTYPES
from .importance import Importance

_SUMS, _COUNTS, _TOTALS = ".in_sum2", ".counts", ".in_sum"
_PREFIX = "model.diffusion_model."
_TOLERANCE = 1e-3
_MAX_NAME_BYTES = 1 << 10
_MAX_LEGACY_BYTES = 1 << 27


def write_importance(path: str | Path, importance: Importance, *, overwrite: bool = False) -> Path:
    """Write an importance matrix as a GGUF.

    Each layer has F32 tensors: `<weight>.in_sum2` and `<weight>.in_sum`, (1, in_features), the latter where it was
    measured, and `<weight>.counts`, (1, 1).

    Returns:
        The path of the file, which can differ from `path`: see `AtomicFile.commit`.
    """
    tokens = max(importance.counts.values(), default=0.0) / max(1, importance.samples)
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": importance.datasets,
        "imatrix.chunk_count": importance.samples,
        "imatrix.chunk_size": max(1, round(tokens)),
    }
    values = {}
    for name in sorted(importance):
        values[name + _SUMS] = importance.sums[name].float()
        values[name + _COUNTS] = torch.tensor([float(importance.counts[name])])
        if name in importance.totals:
            values[name + _TOTALS] = importance.totals[name].float()
    specs = [TensorSpec(name, QTYPES["F32"], (1, len(tensor))) for name, tensor in values.items()]
    with GGUFWriter(path, metadata, specs, overwrite=overwrite) as writer:
        for name, tensor in values.items():
            writer.write(name, tensor.contiguous().view(torch.uint8))
        return writer.close()


def read_importance(path: str | Path) -> Importance:
    """Read an importance matrix in either layout.

    The prefix that stable-diffusion.cpp adds to the tensor names is removed.

    Raises:
        QuantError: not an importance matrix, a layer that never ran, NaN, infinity, or a negative sum.
    """
    path = Path(path)
    try:
        with open_regular(path) as file:
            content = file.read(4)
            is_gguf = content == b"GGUF"
            content += b"" if is_gguf else file.read(_MAX_LEGACY_BYTES)
        importance = _read_gguf(path) if is_gguf else _read_legacy(path, content)
    except OSError as error:
        raise QuantError(f"{path}: cannot be read ({error.strerror}); give the path of an importance matrix") from error
    for name, sums in importance.sums.items():
        if not 0 < importance.counts[name] < math.inf:
            raise QuantError(
                f"{path}: tensor {name}: its count is {importance.counts[name]:g}, expected more than 0 tokens;"
                " collect the importance matrix again"
            )
        if not (sums.isfinite().all() and (sums >= 0).all()):
            raise QuantError(
                f"{path}: tensor {name}: holds NaN, infinity or a negative value, expected sums of squares;"
                " collect the importance matrix again"
            )
    check_totals(importance, str(path))
    return importance


def check_totals(importance: Importance, label: str) -> None:
    """Refuse sums of inputs that these sums of squares cannot have.

    Args:
        label: the start of the message.

    Raises:
        QuantError: another number of channels, NaN, infinity, or a mean above the root mean square.
    """
    for name, totals in importance.totals.items():
        sums = importance.sums.get(name, torch.zeros(0))
        bound = (sums.double() * importance.counts.get(name, 0.0)).sqrt() * (1 + _TOLERANCE)
        if totals.shape != sums.shape or not (totals.abs() <= bound + _TOLERANCE * bound.mean()).all():
            raise QuantError(
                f"{label}: tensor {name}: its sums of inputs do not fit the sums of their squares; collect them again"
            )


def _read_gguf(path: Path) -> Importance:
    file = open_gguf(path)
    metadata = TypedMetadata(file.metadata, str(path))
    sums = {_weight(name, _SUMS): tensor for name, tensor in file.tensors.items() if name.endswith(_SUMS)}
    counts = {_weight(name, _COUNTS): tensor for name, tensor in file.tensors.items() if name.endswith(_COUNTS)}
    totals = {_weight(name, _TOTALS): tensor for name, tensor in file.tensors.items() if name.endswith(_TOTALS)}
    if not sums:
        raise QuantError(
            f"{path}: not an importance matrix (it has no tensor *{_SUMS}); collect one, or use a file of llama-imatrix"
        )
    for name in {**sums, **counts}:
        is_pair = name in sums and name in counts
        if not is_pair or math.prod(counts[name].shape) != 1 or math.prod(sums[name].shape[:-1]) != 1:
            raise QuantError(
                f"{path}: tensor {name}: expected one row of sums and one count, got"
                f" {_shape(sums.get(name))} and {_shape(counts.get(name))}; collect the importance matrix again"
            )
    return Importance(
        {name: tensor.dequantize().flatten() for name, tensor in sums.items()},
        {name: tensor.dequantize().item() for name, tensor in counts.items()},
        metadata.integer("imatrix.chunk_count", 0),
        path.name,
        metadata.texts("imatrix.datasets"),
        {name: tensor.dequantize().flatten() for name, tensor in totals.items()},
    )


def _read_legacy(path: Path, content: bytes) -> Importance:
    sums: dict[str, Tensor] = {}
    counts: dict[str, float] = {}
    try:
        (entries,), at = struct.unpack_from("<i", content), 4
        if entries > MAX_ITEMS:
            raise ValueError(f"{entries} entries, expected at most {MAX_ITEMS}")
        for _ in range(entries):
            (length,), at = struct.unpack_from("<i", content, at), at + 4
            if not 0 < length <= _MAX_NAME_BYTES:
                raise ValueError(f"a name of {length} bytes")
            name, at = _weight(content[at : at + length].decode(), ""), at + length
            (calls, in_features), at = struct.unpack_from("<iI", content, at), at + 8
            sums[name] = torch.from_numpy(np.frombuffer(content, "<f4", in_features, at).astype(np.float32))
            counts[name], at = calls, at + 4 * in_features
    except (struct.error, ValueError) as error:
        raise QuantError(
            f"{path}: neither a GGUF nor a complete .dat importance matrix ({error}); download it again, collect one,"
            " or give a calibration with --calibrate"
        ) from error
    if not sums:
        raise QuantError(f"{path}: not an importance matrix (0 entries); collect one, or use a file of llama-imatrix")
    return Importance(sums, counts, int(max(counts.values())), path.name)


def _shape(tensor: GGUFTensor | None) -> str:
    return "none" if tensor is None else f"shape {tensor.shape}"


def _weight(name: str, suffix: str) -> str:
    return name.removesuffix(suffix).removeprefix(_PREFIX)
