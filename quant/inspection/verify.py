"""The error of a GGUF against the checkpoint that it was made from."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import QuantError
from ..gguf.provenance import DATA_SHA256, NON_FINITE
from ..gguf.reader import GGUFFile, GGUFTensor, open_gguf
from ..plan.wan_shapes import role
from ..sources.checkpoint import SourceTensor, open_checkpoint
from .report import sqnr_db

_SLICE_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class TensorError:
    """Error of one tensor, or of several together: `signal` is the sum of w^2, `noise` that of the squared error."""

    name: str
    qtype: str
    signal: float
    noise: float

    @property
    def relative_error(self) -> float:
        return math.sqrt(self.noise / self.signal) if self.signal else 0.0

    @property
    def sqnr_db(self) -> float:
        return sqnr_db(self.relative_error)


@dataclass(frozen=True)
class Verification:
    """Errors of all tensors that both files have, and the names that only one has."""

    tensors: tuple[TensorError, ...]
    missing: tuple[str, ...]
    """In the source, not in the GGUF."""
    unknown: tuple[str, ...]
    """In the GGUF, not in the source."""

    @property
    def by_role(self) -> list[TensorError]:
        """Totals of self_attn, cross_attn, ffn and so on, then of the whole model."""
        groups: dict[str, list[TensorError]] = {}
        for tensor in self.tensors:
            groups.setdefault(role(tensor.name), []).append(tensor)
        return [_total(name, group) for name, group in (*groups.items(), ("all", self.tensors))]

    def text(self) -> str:
        return "\n".join(
            (
                f"{'tensor':<48}{'type':<8}{'relative error':>15}{'SQNR dB':>10}",
                *(map(_row, self.tensors)),
                "",
                *(map(_row, self.by_role)),
                *(f"only in the source: {name}" for name in self.missing),
                *(f"only in the GGUF: {name}" for name in self.unknown),
            )
        )

    def json(self) -> dict[str, Any]:
        """Plain values; `sqnr_db` is null for an exact copy."""
        return {
            "tensors": [_plain(tensor) for tensor in self.tensors],
            "by_role": [_plain(total) for total in self.by_role],
            "missing": list(self.missing),
            "unknown": list(self.unknown),
        }


def verify(gguf: str | Path, source: str | Path, add_ons: Sequence[str | Path] = ()) -> Verification:
    """Dequantizes every tensor and compares it to the source (and its add-ons), slice by slice.

    Raises:
        QuantError: a file that cannot be read or is not what was written, a shape that differs, or nothing in common.
    """
    file = open_gguf(gguf)
    _check_data(file)
    packed = file.tensors
    with open_checkpoint(source, add_ons) as checkpoint:
        checkpoint = checkpoint.allowing_non_finite() if file.metadata.get(NON_FINITE) else checkpoint
        names = [name for name in checkpoint.tensors if name in packed]
        if not names:
            raise QuantError(f"{gguf}: has no tensor of {source}; give the checkpoint that it was made from")
        errors = tuple(_compare(packed[name], checkpoint.tensors[name]) for name in names)
        missing = tuple(name for name in checkpoint.tensors if name not in packed)
        unknown = tuple(name for name in packed if name not in checkpoint.tensors)
    return Verification(errors, missing, unknown)


def _check_data(file: GGUFFile) -> None:
    """Compares the checksum of the data to the one that the file records, if it does."""
    recorded = file.metadata.get(DATA_SHA256)
    if recorded is None or not file.tensors:
        return
    start = min(tensor.offset for tensor in file.tensors.values())
    mapping = next(iter(file.tensors.values())).mapping
    if hashlib.sha256(mapping[start:].numpy().data).hexdigest() != recorded:
        raise QuantError(f"{file.path}: its data is not what was written ({DATA_SHA256}); copy or convert it again")


def _compare(packed: GGUFTensor, source: SourceTensor) -> TensorError:
    if math.prod(packed.shape) != math.prod(source.shape):
        raise QuantError(
            f"{packed.path}: tensor {packed.name}: shape {packed.shape}, in the source {source.shape};"
            " give the checkpoint that it was made from"
        )
    rows = packed.data.view(-1, packed.data.shape[-1])
    columns = math.prod(packed.shape) // len(rows)
    step = max(1, _SLICE_ELEMENTS // columns)
    signal = noise = 0.0
    for start in range(0, len(rows), step):
        weight = packed.qtype.dequantize(rows[start : start + step])
        expected = source.read(start * columns, start * columns + weight.numel()).float().view_as(weight)
        signal += expected.square().sum().item()
        noise += weight.sub_(expected).square_().sum().item()
    return TensorError(packed.name, packed.qtype.name, signal, noise)


def _total(name: str, group: Sequence[TensorError]) -> TensorError:
    return TensorError(name, "", sum(t.signal for t in group), sum(t.noise for t in group))


def _row(error: TensorError) -> str:
    return f"{error.name:<48}{error.qtype:<8}{error.relative_error:>15.3e}{error.sqnr_db:>10.2f}"


def _plain(error: TensorError) -> dict[str, Any]:
    exact = error.noise == 0
    return {**asdict(error), "relative_error": error.relative_error, "sqnr_db": None if exact else error.sqnr_db}
