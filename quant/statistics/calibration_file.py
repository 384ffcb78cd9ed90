"""Files of calibrations: a safetensors file with what is known of the inputs, by the name of the layer's weight.

`<weight>` is F32, (in_features / span, span, span): see `Calibration.products`. Beside it lie `<weight>.totals`, F32
(in_features,), `<weight>.factors`, F32 (in_features, rank), and `<weight>.held_out`, BF16 (tokens, in_features), which
files of version 0.1.0 lack, and of which the last two may be absent.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
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
from ..sources.tensors import DTYPES
from .calibration import SPAN, Calibration
from .held_out import TOKENS
from .importance_file import check_totals
from .leading_factors import RANK

SUFFIX = ".safetensors"
PARTS = ("totals", "factors", "held_out")
"""What may lie beside the products, by the names of the attributes of a `Calibration`."""

# The largest difference of two products that should be equal, relative to the largest product.
_ASYMMETRY = 1e-3
_KEY = "wanquant.calibration"
"""JSON: {"samples": evaluations, "counts": {weight: tokens}, "same": {weight: another one with the same inputs}}."""


def write_calibration(path: str | Path, calibration: Calibration, *, overwrite: bool = False) -> Path:
    """Write a calibration as safetensors.

    Layers with the same inputs, such as the query, key and value projections of a block, share one tensor.

    Returns:
        The path of the file, which can differ from `path`: see `AtomicFile.commit`.
    """
    shared = _layers_by_inputs(calibration)
    tensors = {}
    for name in dict.fromkeys(shared.values()):
        tensors[name] = calibration.products[name]
        for part in PARTS:
            if name in (values := getattr(calibration, part)):
                tensors[f"{name}.{part}"] = values[name]
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


def _layers_by_inputs(calibration: Calibration) -> dict[str, str]:
    """Return the first layer with the same inputs, by the name of each layer's weight."""
    first: dict[bytes, list[str]] = {}
    shared = {}
    for name in sorted(calibration):
        others = first.setdefault(calibration.sums[name].numpy().tobytes(), [])
        products = calibration.products[name]
        same = (other for other in others if torch.equal(calibration.products[other], products))
        shared[name] = next(same, name)
        if shared[name] == name:
            others.append(name)
    return shared


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
    stored = _Stored(file, {entry.name: entry for entry in entries}, {name: same.get(name, name) for name in counts})
    products = _Values(counts, stored.products)
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
        if not _is_symmetric(values):
            raise QuantError(
                f"{path}: tensor {name}: is not symmetric, expected sums of x x^T; collect the calibration again"
            )
    totals = {name: stored.totals(name) for name in counts if stored.has(name, "totals")}
    factors, held_out = (
        _Values([name for name in counts if stored.has(name, part)], partial(stored.rows, part))
        for part in ("factors", "held_out")
    )
    for _ in itertools.chain(factors.values(), held_out.values()):
        pass  # reading checks them
    calibration = Calibration(
        sums, counts, samples, path.name, totals=totals, products=products, factors=factors, held_out=held_out
    )
    check_totals(calibration, str(path))
    return calibration


def _is_symmetric(products: Tensor) -> bool:
    """Return whether products are symmetric but for the order in which they were added up."""
    return bool((products - products.mT).abs().amax() <= _ASYMMETRY * products.abs().amax())


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


class _Values(Mapping[str, Tensor]):
    """Values that are read from the file at each access."""

    def __init__(self, names: Collection[str], read: Callable[[str], Tensor]) -> None:
        self._names, self._read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Stored:
    """The tensors of a file.

    Args:
        places: by the name of a weight, that of the weight whose values it shares.
    """

    def __init__(self, file: HashedFile, entries: Mapping[str, TensorEntry], places: Mapping[str, str]) -> None:
        self._file, self._entries, self._places = file, entries, places

    def has(self, name: str, part: str) -> bool:
        """Return whether a part lies beside the products of a weight."""
        return f"{self._places[name]}.{part}" in self._entries

    def products(self, name: str) -> Tensor:
        """Return the products of a weight: see `Calibration.products`."""
        entry = self._entries.get(self._places[name])
        match entry:
            case TensorEntry(dtype="F32", shape=(n, rows, span)) if (
                n * span and rows == span and span % math.gcd(n * span, SPAN) == 0
            ):
                return self._read(entry)
        raise self._misfit(name, "products", entry, "F32 (n, span, span)")

    def totals(self, name: str) -> Tensor:
        """Return the sums of a layer's inputs: see `Calibration.totals`."""
        return self._part(name, "totals", "F32", (self._width(name),))

    def rows(self, part: str, name: str) -> Tensor:
        """Return the factors of a layer, or its held-out tokens: see `Calibration`."""
        shape = self._entries[f"{self._places[name]}.{part}"].shape or (0,)
        if part == "factors":
            values = self._part(name, part, "F32", (self._width(name), min(shape[-1], RANK)))
        else:
            values = self._part(name, part, "BF16", (min(shape[0], TOKENS), self._width(name)))
        if not values.isfinite().all():
            raise QuantError(
                f"{self._file.path}: tensor {name}: {part} hold NaN or infinity, expected finite numbers;"
                " collect the calibration again"
            )
        return values

    def _width(self, name: str) -> int:
        return math.prod(self._entries[self._places[name]].shape[:2])

    def _part(self, name: str, part: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
        entry = self._entries[f"{self._places[name]}.{part}"]
        if (entry.dtype, entry.shape) != (dtype, shape):
            raise self._misfit(name, part, entry, f"{dtype} {shape}")
        return self._read(entry)

    def _read(self, entry: TensorEntry) -> Tensor:
        values = self._file.peek(entry.begin, entry.end - entry.begin)
        return values.view(DTYPES[entry.dtype]).view(entry.shape)

    def _misfit(self, name: str, part: str, entry: TensorEntry | None, expected: str) -> QuantError:
        got = "none" if entry is None else f"{entry.dtype} {entry.shape}"
        return QuantError(
            f"{self._file.path}: tensor {name}: {part} are {got}, expected {expected}; collect the calibration again"
        )
