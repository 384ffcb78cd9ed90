"""Files of calibrations: a safetensors file with the blocks of X^T X, by the name of the layer's weight.

Each tensor is F32, (in_features / span, span, span): see `Calibration.products`.
"""

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
from ..files.strict_json import parse_json
from ..sources.files import HashedFile
from .calibration import SPAN, Calibration

SUFFIX = ".safetensors"

_KEY = "wanquant.calibration"
"""JSON: {"samples": evaluations, "counts": {weight: tokens}, "same": {weight: another one with the same inputs}}."""


def write_calibration(path: str | Path, calibration: Calibration, *, overwrite: bool = False) -> Path:
    """Write a calibration as safetensors.

    Layers with the same inputs, such as the query, key and value projections of a block, share one tensor.

    Returns:
        The path of the file, which can differ from `path`: see `AtomicFile.commit`.
    """
    first: dict[bytes, str] = {}
    shared = {name: first.setdefault(calibration.sums[name].numpy().tobytes(), name) for name in sorted(calibration)}
    tensors = {name: calibration.products[name] for name in first.values()}
    described = {
        "samples": calibration.samples,
        "counts": {name: calibration.counts[name] for name in sorted(calibration)},
        "same": {name: other for name, other in shared.items() if name != other},
    }
    content = SafetensorsContent(
        (StreamedTensor.whole(name, tensor) for name, tensor in tensors.items()), {_KEY: json.dumps(described)}
    )
    with AtomicFile(Path(path), content.nbytes, overwrite=overwrite) as file:
        content.write(file)
        return file.commit()


def read_calibration(path: str | Path) -> Calibration:
    """Read a calibration, and check all its values.

    The products stay in the file: those of a layer are read again when the layer is encoded.

    Raises:
        QuantError: not a calibration, a layer that never ran, NaN, infinity, or a negative square.
    """
    path = Path(path)
    file = HashedFile(path)
    metadata, entries = read_safetensors_header(path)
    samples, counts, same = _description(path, metadata)
    products = _StoredProducts(
        file, {entry.name: entry for entry in entries}, {name: same.get(name, name) for name in counts}
    )
    sums = {}
    for name, count in counts.items():
        if not 0 < count < math.inf:
            raise QuantError(
                f"{path}: tensor {name}: its count is {count:g}, expected more than 0 tokens;"
                " collect the calibration again"
            )
        values = products[name]
        sums[name] = values.diagonal(dim1=1, dim2=2).flatten()
        if not (values.isfinite().all() and (sums[name] >= 0).all()):
            raise QuantError(
                f"{path}: tensor {name}: holds NaN, infinity or a negative square, expected sums of x x^T;"
                " collect the calibration again"
            )
    return Calibration(sums, counts, samples, path.name, products=products)


def _description(path: Path, metadata: Mapping[str, str]) -> tuple[int, dict[str, float], dict[str, str]]:
    """Return `samples`, `counts` and `same` of the metadata."""
    described: Any = parse_json(metadata.get(_KEY, "null"), f"{path}: {_KEY}", "collect the calibration again")
    match described:
        case {"samples": int(samples), "counts": dict(counts), "same": dict(same)} if all(
            type(count) in (int, float) for count in counts.values()
        ) and all(isinstance(other, str) for other in same.values()):
            return samples, counts, same
    raise QuantError(
        f"{path}: not a calibration (no valid {_KEY} in its metadata); collect one with"
        " Collect Importance Matrix and its option calibrate"
    )


class _StoredProducts(Mapping[str, Tensor]):
    """The products of a calibration, which are read from the file at each access."""

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
            f"{self._file.path}: tensor {name}: products are {got}, expected F32 (n, span, span);"
            " collect the calibration again"
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
