"""The quantization error of a GGUF, measured against the checkpoint that it was made from."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import QuantError, printable_lines
from ..gguf.provenance import DATA_SHA256, NON_FINITE, corrected_in
from ..gguf.reader import GGUFFile, GGUFTensor
from ..plan.wan_shapes import role
from ..sources.checkpoint import SourceTensor, open_checkpoint
from ..sources.model_tensors import open_model
from ..squares import sum_of_squares
from .report import sqnr_db

_SLICE_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class TensorError:
    """The error of one tensor, or the total of several."""

    name: str
    qtype: str
    signal: float
    """The sum of the squared source values."""
    noise: float
    """The sum of the squared errors."""

    @property
    def relative_error(self) -> float:
        """The root of noise / signal."""
        return math.sqrt(self.noise / self.signal) if self.signal else 0.0

    @property
    def sqnr_db(self) -> float:
        return sqnr_db(self.relative_error)


@dataclass(frozen=True)
class Verification:
    """The errors of all tensors that both files have, and the names of tensors that only one of them has."""

    tensors: tuple[TensorError, ...]
    missing: tuple[str, ...]
    """The names of tensors that are only in the source."""
    unknown: tuple[str, ...]
    """The names of tensors that are only in the GGUF."""
    corrected: frozenset[str] = frozenset()
    """The names of biases that differ on purpose, to make up for the errors of weights; no total counts them."""

    @property
    def by_role(self) -> list[TensorError]:
        """The totals of each role (self_attn, cross_attn, ffn, ...), then the total of the model."""
        groups: dict[str, list[TensorError]] = {}
        counted = [tensor for tensor in self.tensors if tensor.name not in self.corrected]
        for tensor in counted:
            groups.setdefault(role(tensor.name), []).append(tensor)
        return [_total(name, group) for name, group in (*groups.items(), ("all", counted))]

    def text(self) -> str:
        return printable_lines(
            (
                f"{'tensor':<48}{'type':<8}{'relative error':>15}{'SQNR dB':>10}",
                *(map(_row, self.tensors)),
                "",
                *(map(_row, self.by_role)),
                *self._corrections(),
                *(f"only in the source: {name}" for name in self.missing),
                *(f"only in the GGUF: {name}" for name in self.unknown),
            )
        )

    def json(self) -> dict[str, Any]:
        """Return plain values; `sqnr_db` is None for an exact copy."""
        return {
            "tensors": [_plain(tensor) for tensor in self.tensors],
            "by_role": [_plain(total) for total in self.by_role],
            "missing": list(self.missing),
            "unknown": list(self.unknown),
            "corrected": sorted(self.corrected),
        }

    def _corrections(self) -> Iterator[str]:
        if self.corrected:
            yield (
                f"{len(self.corrected)} biases differ on purpose and are in no total: they make up for the mean errors"
                " of their layers"
            )


def verify(gguf: str | Path, source: str | Path, add_ons: Sequence[str | Path] = ()) -> Verification:
    """Dequantize every tensor of a GGUF and compare it with the source, slice by slice.

    Args:
        gguf: path of the GGUF, made by any converter.
        source: path of the checkpoint that it was made from, as for `open_checkpoint`.
        add_ons: add-on files that were merged onto the source.

    Raises:
        QuantError: an unreadable or damaged file, a tensor with another shape, or files without a common tensor.
    """
    file = open_model(gguf)
    _check_data(file)
    packed = file.tensors
    with open_checkpoint(source, add_ons) as checkpoint:
        checkpoint = checkpoint.allowing_non_finite() if file.metadata.get(NON_FINITE) else checkpoint
        names = [name for name in checkpoint.tensors if name in packed]
        if not names:
            raise QuantError(
                f"{gguf}: has no tensor in common with {source}; give the checkpoint that the GGUF was made from"
            )
        errors = tuple(_compare(packed[name], checkpoint.tensors[name]) for name in names)
        missing = tuple(name for name in checkpoint.tensors if name not in packed)
        unknown = tuple(name for name in packed if name not in checkpoint.tensors)
    return Verification(errors, missing, unknown, corrected_in(file.metadata) & set(names))


def _check_data(file: GGUFFile) -> None:
    """Refuse a file whose data does not have the SHA-256 that its metadata records, if there is one."""
    recorded = file.metadata.get(DATA_SHA256)
    if recorded is None or not file.tensors:
        return
    start = min(tensor.offset for tensor in file.tensors.values())
    mapping = next(iter(file.tensors.values())).mapping
    found = hashlib.sha256(mapping[start:].numpy().data).hexdigest()
    if found != recorded:
        raise QuantError(
            f"{file.path}: its data is damaged: its SHA-256 is {found:.8}..., expected {recorded:.8}... as in"
            f" {DATA_SHA256}; copy or convert the file again"
        )


def _compare(packed: GGUFTensor, source: SourceTensor) -> TensorError:
    if math.prod(packed.shape) != math.prod(source.shape):
        raise QuantError(
            f"{packed.path}: tensor {packed.name}: shape {packed.shape}, expected {source.shape} as in the source;"
            " give the checkpoint that the GGUF was made from"
        )
    rows = packed.data.view(-1, packed.data.shape[-1])
    row_elements = math.prod(packed.shape) // len(rows)
    step = max(1, _SLICE_ELEMENTS // row_elements)
    signal = noise = 0.0
    for start in range(0, len(rows), step):
        weight = packed.qtype.dequantize(rows[start : start + step])
        expected = source.read(start * row_elements, start * row_elements + weight.numel()).float().view_as(weight)
        signal += sum_of_squares(expected)
        noise += sum_of_squares(weight.sub_(expected))
    return TensorError(packed.name, packed.qtype.name, signal, noise)


def _total(name: str, group: Sequence[TensorError]) -> TensorError:
    return TensorError(name, "", sum(t.signal for t in group), sum(t.noise for t in group))


def _row(error: TensorError) -> str:
    return f"{error.name:<48}{error.qtype:<8}{error.relative_error:>15.3e}{error.sqnr_db:>10.2f}"


def _plain(error: TensorError) -> dict[str, Any]:
    exact = error.noise == 0
    return {**asdict(error), "relative_error": error.relative_error, "sqnr_db": None if exact else error.sqnr_db}
