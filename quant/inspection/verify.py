"""The quantization error of a file, measured against the checkpoint that it was made from."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import QuantError, printable_lines
from ..gguf.provenance import CALIBRATED, DATA_SHA256, NON_FINITE, baked_into, corrected_in
from ..gguf.reader import GGUFTensor
from ..plan.wan_shapes import role
from ..safetensors.header import NativeRecord, read_native_header
from ..sources.baked_lora import LoRA
from ..sources.checkpoint import SourceTensor, open_checkpoint
from ..sources.model_tensors import open_model
from ..sources.t5 import transformers_name
from ..squares import sum_of_squares
from ..units import counted
from .report import sqnr_db

_SLICE_ELEMENTS = 1 << 22
_READ_BYTES = 16 << 20


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
    """The names of tensors that are only in the file."""
    corrected: frozenset[str] = frozenset()
    """The names of biases that differ on purpose, to make up for the errors of weights; no total counts them."""
    other_loras: tuple[tuple[str, ...], ...] = ()
    """The LoRAs in the file, and those added to the source, if these differ."""
    is_calibrated: bool = False
    """Whether the file records that weights were rounded for the outputs of their layers."""

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
                f"{'tensor':<48}{'type':<16}{'relative error':>15}{'SQNR dB':>10}",
                *(map(_row, self.tensors)),
                "",
                *(map(_row, self.by_role)),
                *self._remarks(),
                *self._loras(),
                *(f"only in the source: {name}" for name in self.missing),
                *(f"only in the file: {name}" for name in self.unknown),
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
            "other_loras": [list(loras) for loras in self.other_loras],
            "calibrated": self.is_calibrated,
        }

    def _loras(self) -> Iterator[str]:
        if self.other_loras:
            in_file, added = (", ".join(loras) or "none" for loras in self.other_loras)
            yield (
                f"the file was made with LoRAs: {in_file}; it was compared with LoRAs: {added}; errors count the"
                " difference; give the same ones (--lora)"
            )

    def _remarks(self) -> Iterator[str]:
        if self.is_calibrated:
            yield "weights were rounded for the outputs of their layers, which makes their own errors larger"
        if self.corrected:
            yield (
                f"{counted(len(self.corrected), 'bias differs', 'biases differ')} on purpose, outside of all"
                " totals, to make up for the mean errors of layers"
            )


def verify(
    gguf: str | Path, source: str | Path, add_ons: Sequence[str | Path] = (), loras: Sequence[LoRA] = ()
) -> Verification:
    """Dequantize every tensor of a GGUF or safetensors file and compare it with the source, slice by slice.

    Args:
        gguf: path of the file, made by any converter.
        source: path of the checkpoint that it was made from, as for `open_checkpoint`.
        add_ons: add-on files that were merged onto the source.
        loras: LoRAs that were added to the weights of the source.

    Raises:
        QuantError: an unreadable or damaged file, a tensor with another shape, or files without a common tensor.
    """
    with ExitStack() as stack:
        metadata, decoded = _decoded(Path(gguf), stack)
        checkpoint = stack.enter_context(open_checkpoint(source, add_ons, loras))
        checkpoint = checkpoint.allowing_non_finite() if metadata.get(NON_FINITE) is True else checkpoint
        names = [name for name in checkpoint.tensors if name in decoded]
        if not names:
            raise QuantError(
                f"{gguf}: has no tensor in common with {source}; give the checkpoint that the file was made from"
            )
        errors = tuple(_compare(decoded[name], checkpoint.tensors[name]) for name in names)
        missing = tuple(name for name in checkpoint.tensors if name not in decoded)
        unknown = tuple(name for name in decoded if name not in checkpoint.tensors)
    corrected, is_calibrated = corrected_in(metadata) & set(names), metadata.get(CALIBRATED) is True
    baked, given = baked_into(metadata), tuple(map(str, loras))
    other = () if baked == given else (baked, given)
    return Verification(errors, missing, unknown, corrected, other, is_calibrated)


class Decoded(NamedTuple):
    """A tensor of the file to verify, which is decoded some rows at a time."""

    path: Path
    name: str
    stored: str
    shape: tuple[int, ...]
    rows: int
    """The number of rows that can be decoded separately."""
    decode: Callable[[int, int], Tensor]
    """Takes the first row and that behind the last one, and returns their values as floating point, of any shape."""


def _decoded(path: Path, stack: ExitStack) -> tuple[Mapping[str, Any], Mapping[str, Decoded]]:
    """Return the metadata and the tensors of a file, after a check of its data."""
    if path.suffix.lower() == ".safetensors":
        header = read_native_header(path)
        _check_sha256(path, header.metadata, header.data_start)
        tensors = stack.enter_context(open_checkpoint(path)).tensors
        return header.metadata, {name: _of_native(path, header.tensors, tensor) for name, tensor in tensors.items()}
    file = open_model(path)
    if file.tensors:
        _check_sha256(file.path, file.metadata, min(tensor.offset for tensor in file.tensors.values()))
    return file.metadata, {name: _of_gguf(tensor) for name, tensor in file.tensors.items()}


def _of_gguf(tensor: GGUFTensor) -> Decoded:
    rows = tensor.data.view(-1, tensor.data.shape[-1])
    decode = lambda first, last: tensor.qtype.dequantize(rows[first:last])  # noqa: E731
    return Decoded(tensor.path, tensor.name, tensor.stored, tensor.shape, len(rows), decode)


def _of_native(path: Path, records: Mapping[str, NativeRecord], tensor: SourceTensor) -> Decoded:
    rows = tensor.shape[0] if tensor.shape else 1
    elements = math.prod(tensor.shape) // rows
    decode = lambda first, last: tensor.read(first * elements, last * elements)  # noqa: E731
    record = records.get(transformers_name(tensor.name))
    stored = tensor.stored if record is None else record.stored
    return Decoded(path, tensor.name, stored, tensor.shape, rows, decode)


def _check_sha256(path: Path, metadata: Mapping[str, Any], start: int) -> None:
    """Refuse a file whose data, from byte `start` on, does not have the SHA-256 that its metadata records as text."""
    recorded = metadata.get(DATA_SHA256)
    if not isinstance(recorded, str):
        return
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while part := file.read(_READ_BYTES):
            digest.update(part)
    found = digest.hexdigest()
    if found != recorded:
        raise QuantError(
            f"{path}: its data is damaged: its SHA-256 is {found:.8}..., expected {recorded:.8}... as in"
            f" {DATA_SHA256}; copy or convert the file again"
        )


def _compare(found: Decoded, source: SourceTensor) -> TensorError:
    if math.prod(found.shape) != math.prod(source.shape):
        raise QuantError(
            f"{found.path}: tensor {found.name}: shape {found.shape}, expected {source.shape} as in the source;"
            " give the checkpoint that the file was made from"
        )
    row_elements = math.prod(found.shape) // found.rows
    step = max(1, _SLICE_ELEMENTS // row_elements)
    signal = noise = 0.0
    for start in range(0, found.rows, step):
        weight = found.decode(start, min(start + step, found.rows)).float()
        expected = source.read(start * row_elements, start * row_elements + weight.numel()).float().view_as(weight)
        signal += sum_of_squares(expected)
        noise += sum_of_squares(weight.sub_(expected))
    return TensorError(found.name, found.stored, signal, noise)


def _total(name: str, group: Sequence[TensorError]) -> TensorError:
    return TensorError(name, "", sum(t.signal for t in group), sum(t.noise for t in group))


def _row(error: TensorError) -> str:
    return f"{error.name:<48}{error.qtype:<16}{error.relative_error:>15.3e}{error.sqnr_db:>10.2f}"


def _plain(error: TensorError) -> dict[str, Any]:
    exact = error.noise == 0
    return {**asdict(error), "relative_error": error.relative_error, "sqnr_db": None if exact else error.sqnr_db}
