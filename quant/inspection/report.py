"""A report of the contents of a GGUF or safetensors file, as records, text and JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import QuantError, printable, printable_lines
from ..gguf.header import ORIG_SHAPE_KEY
from ..gguf.provenance import corrected_in, relative_errors
from ..plan.wan_shapes import role
from ..safetensors.header import read_any_header
from ..sources.names import T5, find_naming
from ..sources.t5 import is_tokenizer
from ..units import GIB, MIB, counted

_MAX_VALUE_CHARS = 80
_MAX_LISTED_ERRORS = 5
_MAX_LISTED_NAMES = 4


@dataclass(frozen=True)
class TensorSummary:
    """A tensor of a file."""

    name: str
    qtype: str
    shape: tuple[int, ...]
    nbytes: int
    relative_error: float | None
    """|dequantized - source| / |source|, or None if the file does not record it."""

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def role(self) -> str:
        return role(self.name)


@dataclass(frozen=True)
class TypeTotal:
    """The totals of all tensors of one type."""

    qtype: str
    count: int
    """The number of tensors."""
    nbytes: int
    n_elements: int

    def json(self) -> dict[str, Any]:
        return {"qtype": self.qtype, "count": self.count, "nbytes": self.nbytes, "weights": self.n_elements}


@dataclass(frozen=True)
class FileReport:
    """A report of the contents of a file."""

    path: Path
    nbytes: int
    """The size of the file, or of all parts of a split one."""
    metadata: Mapping[str, Any]
    tensors: tuple[TensorSummary, ...]

    @property
    def kind(self) -> str:
        """A description of the model in the file."""
        architecture = self.metadata.get("general.architecture", "unnamed")
        try:
            naming = find_naming(self.path, {tensor.name for tensor in self.tensors})
        except QuantError:
            return (
                f"not a Wan diffusion model: general.architecture is {printable(str(architecture), _MAX_VALUE_CHARS)}"
            )
        if naming.architecture == T5:
            return "T5 text encoder"
        return "add-on for a Wan diffusion model" if naming.is_add_on else "Wan diffusion model"

    @property
    def bits_per_weight(self) -> float:
        return 8 * sum(t.nbytes for t in self.tensors) / max(1, sum(t.n_elements for t in self.tensors))

    @property
    def by_type(self) -> list[TypeTotal]:
        """The totals of each type; the type with the most bytes is first."""
        groups: dict[str, list[TensorSummary]] = {}
        for tensor in self.tensors:
            groups.setdefault(tensor.qtype, []).append(tensor)
        totals = (
            TypeTotal(qtype, len(group), sum(t.nbytes for t in group), sum(t.n_elements for t in group))
            for qtype, group in groups.items()
        )
        return sorted(totals, key=lambda total: -total.nbytes)

    def text(self) -> str:
        """Return a table of the types, the largest errors and the metadata, for a terminal."""
        width = max(8, *(len(total.qtype) + 1 for total in self.by_type), 0)
        corrected = corrected_in(self.metadata)  # they differ on purpose
        errors = sorted(((t.relative_error, t.name) for t in self.tensors if t.relative_error), reverse=True)
        errors = [(error, name) for error, name in errors if name not in corrected]
        return printable_lines(
            (
                f"{self.path.name}: {self.kind}",
                f"{self.nbytes / GIB:.3f} GiB, {counted(len(self.tensors), 'tensor')},"
                f" {self.bits_per_weight:.3f} bits per weight",
                "",
                f"{'type':<{width}}{'tensors':>8}{'MiB':>12}{'bits/weight':>13}",
                *(
                    f"{t.qtype:<{width}}{t.count:>8}{t.nbytes / MIB:>12.2f}{8 * t.nbytes / t.n_elements:>13.4f}"
                    for t in self.by_type
                ),
                *(("", f"largest errors (of {counted(len(errors), 'inexact tensor')}):") if errors else ()),
                *(f"{sqnr_db(error):8.2f} dB  {name}" for error, name in errors[:_MAX_LISTED_ERRORS]),
                "",
                *(f"{key}: {value}" for key, value in _readable(self.metadata)),
            )
        )

    def json(self) -> dict[str, Any]:
        """Return the report as plain values; an array in the metadata is replaced by its length."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "bytes": self.nbytes,
            "bits_per_weight": self.bits_per_weight,
            "types": [total.json() for total in self.by_type],
            "metadata": dict(_readable(self.metadata)),
            "tensors": [asdict(tensor) for tensor in self.tensors],
        }


def inspect(path: str | Path) -> FileReport:
    """Return the report of any GGUF or safetensors file; only headers are read, of a split GGUF those of all parts.

    Raises:
        QuantError: not a well-formed file.
    """
    header = read_any_header(path)
    errors = relative_errors(header.metadata, [name for name in header.tensors if not is_tokenizer(name)])
    tensors = tuple(
        TensorSummary(name, record.stored, record.shape, record.nbytes, errors.get(name))
        for name, record in header.tensors.items()
    )
    return FileReport(header.path, header.size, header.metadata, tensors)


def sqnr_db(relative_error: float) -> float:
    """Return the signal-to-quantization-noise ratio in dB; infinite for an exact copy."""
    return -20 * math.log10(relative_error) if relative_error else math.inf


def _readable(metadata: Mapping[str, Any]) -> Iterator[tuple[str, str | int | float]]:
    for key, value in metadata.items():
        if key.startswith(ORIG_SHAPE_KEY):
            continue
        if isinstance(value, float) and not math.isfinite(value):
            yield key, str(value)  # JSON has no such numbers
        elif isinstance(value, (bool, int, float)):
            yield key, value
        elif isinstance(value, str):
            cut = len(value) > _MAX_VALUE_CHARS
            shown = printable(value[:_MAX_VALUE_CHARS])
            yield key, f"{shown}... ({len(value)} characters)" if cut else shown
        elif len(value) <= _MAX_LISTED_NAMES and all(isinstance(item, str) for item in value):
            yield key, ", ".join(printable(item, _MAX_VALUE_CHARS) for item in value)
        else:
            yield key, f"array of {len(value)}" + (f" {value.dtype}" if isinstance(value, np.ndarray) else "")
