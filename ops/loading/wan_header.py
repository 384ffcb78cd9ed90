"""The tensors of a GGUF of Wan in the names and shapes of the host's model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...quant.gguf.header import Header, TensorRecord
from ...quant.sources.animate import joined_shape, with_joined_halves
from ...quant.sources.checkpoint import open_checkpoint
from ...quant.sources.model_tensors import model_tensors
from ...quant.sources.names import Naming
from .file_mapping import TensorData


@dataclass(frozen=True)
class JoinedRecord(TensorRecord):
    """Two matrices of a file that are one in the host's model: the rows of the first, then those of the second."""

    halves: tuple[TensorRecord, TensorRecord]


@dataclass(frozen=True)
class SourceRecord(TensorRecord):
    """A tensor that its file stores with scales, so that its values are computed when it is loaded."""

    dtype: torch.dtype
    """The dtype that `qtype` stands for."""


def wan_header(header: Header, naming: Naming) -> Header:
    """Return the header of a Wan transformer with the host's names and shapes.

    Raises:
        QuantError: a name that has no counterpart in the host, or a tensor without its other half.
    """
    records = model_tensors(naming, header.tensors.values()).values()
    return replace(header, tensors={record.name: record for record in with_joined_halves(records, _joined)})


def copied_bytes(header: Header) -> int:
    """Return the bytes of the tensors that cannot be mapped."""
    return sum(r.nbytes for r in header.tensors.values() if isinstance(r, JoinedRecord | SourceRecord))


def with_copies(header: Header, mapped: TensorData) -> TensorData:
    """Return a function that returns the bytes of all records, of those that cannot be mapped as a copy.

    The bytes are uint8, (*stored_shape[:-1], row_bytes).

    Raises:
        QuantError: a file of tensors that are stored with scales was changed.
    """
    computed = _computed(header)

    def data(record: TensorRecord) -> Tensor:
        if isinstance(record, JoinedRecord):
            return torch.cat([mapped(half) for half in record.halves])
        return computed[record.name] if isinstance(record, SourceRecord) else mapped(record)

    return data


def _computed(header: Header) -> dict[str, Tensor]:
    """Return the bytes of the tensors that are stored with scales, by their names."""
    records = [record for record in header.tensors.values() if isinstance(record, SourceRecord)]
    values = {}
    for path in {record.path for record in records}:
        with open_checkpoint(path) as source:
            for record in (record for record in records if record.path == path):
                value = source.tensors[record.name].read().to(record.dtype)
                values[record.name] = value.view(record.shape).view(torch.uint8)
    return values


def _joined(name: str, first: TensorRecord, second: TensorRecord) -> TensorRecord:
    advice = f"convert {first.path} with Convert to Quantized Model and load the result"
    shape = joined_shape(first, second, (first.qtype.name, second.qtype.name), advice)
    nbytes = first.nbytes + second.nbytes
    return JoinedRecord(name, first.qtype, shape, shape, first.path, first.offset, nbytes, (first, second))
