"""Files of calibrations: safetensors with F32 products (columns / span, span, span) by the name of the weight."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import QuantError
from ..files.atomic_file import AtomicFile
from ..files.safetensors_content import SafetensorsContent, StreamedTensor
from ..files.safetensors_header import TensorEntry, read_safetensors_header
from ..sources.files import HashedFile
from .calibration import SPAN, Calibration

SUFFIX = ".safetensors"

_KEY = "wanquant.calibration"
"""JSON: {"samples": evaluations, "counts": {weight: rows}, "same": {weight: another with the same inputs}}."""


def write_calibration(path: str | Path, calibration: Calibration, *, overwrite: bool = False) -> Path:
    """Writes the products of each input once: the queries, keys and values of a block have the same.

    Returns:
        The file's path, which can differ from the one asked for: see `AtomicFile.commit`.
    """
    first: dict[bytes, str] = {}
    kept = {name: first.setdefault(calibration.sums[name].numpy().tobytes(), name) for name in sorted(calibration)}
    tensors = {name: calibration.products[name] for name in first.values()}
    described = {
        "samples": calibration.samples,
        "counts": {name: calibration.counts[name] for name in sorted(calibration)},
        "same": {name: other for name, other in kept.items() if name != other},
    }
    content = SafetensorsContent(
        (StreamedTensor.whole(name, tensor) for name, tensor in tensors.items()), {_KEY: json.dumps(described)}
    )
    with AtomicFile(Path(path), content.nbytes, overwrite=overwrite) as file:
        content.write(file)
        return file.commit()


def read_calibration(path: str | Path) -> Calibration:
    """Reads all of it once as a check; the products of a layer are read again when it is encoded.

    Raises:
        QuantError: not a calibration, or one with a layer that was never run, NaN, or a negative square.
    """
    path = Path(path)
    file = HashedFile(path)
    metadata, entries = read_safetensors_header(path)
    samples, counts, same = _described(path, metadata)
    products = _Stored(file, {entry.name: entry for entry in entries}, {name: same.get(name, name) for name in counts})
    sums = {}
    for name, count in counts.items():
        if not 0 < count < math.inf:
            raise QuantError(f"{path}: tensor {name}: its count is {count:g}; collect it again")
        values = products[name]
        sums[name] = values.diagonal(dim1=1, dim2=2).flatten()
        if not (values.isfinite().all() and (sums[name] >= 0).all()):
            raise QuantError(f"{path}: tensor {name}: holds NaN, infinity or a negative square; collect it again")
    return Calibration(sums, counts, samples, path.name, products=products)


def _described(path: Path, metadata: Mapping[str, str]) -> tuple[int, dict[str, float], dict[str, str]]:
    """Evaluations, counts and names of equal inputs."""
    described: Any = json.loads(metadata.get(_KEY, "null"))
    match described:
        case {"samples": int(samples), "counts": dict(), "same": dict()}:
            return samples, described["counts"], described["same"]
    raise QuantError(f"{path}: no calibration (no {_KEY} in its metadata); collect one with products, and save it")


class _Stored(Mapping[str, Tensor]):
    """Products that stay in their file until they are read."""

    def __init__(self, file: HashedFile, entries: Mapping[str, TensorEntry], places: Mapping[str, str]) -> None:
        self._file, self._entries, self._places = file, entries, places

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries.get(self._places[name])
        match entry:
            case TensorEntry(dtype="F32", shape=(n, rows, span), begin=begin, end=end) if (
                n and rows == span and span % math.gcd(n * span, SPAN) == 0
            ):
                values = self._file.peek(begin, end - begin)
                return values.view(torch.float32).view(entry.shape)
        got = "none" if entry is None else f"{entry.dtype} {entry.shape}"
        raise QuantError(
            f"{self._file.path}: tensor {name}: products are {got}, expected F32 (n, span, span); collect it again"
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
