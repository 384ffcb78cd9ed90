"""Wan add-ons (VACE and the like) that are added to a GGUF as it is loaded."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from ...quant import QTYPES, QuantError
from ...quant.gguf.header import Header, TensorRecord
from ...quant.sources.add_ons import check_add_on
from ...quant.sources.checkpoint import open_checkpoint
from ...quant.sources.names import find_naming
from ...quant.sources.tensors import PackedTensor, PlainTensor, SourceTensor


def with_add_on(base: Header, path: str | os.PathLike[str]) -> Header:
    """Return the header of the model that a transformer and an add-on form.

    Args:
        base: of the transformer's GGUF, which is not opened again.
        path: of the add-on, a GGUF or safetensors file.

    Raises:
        QuantError: the base is not a Wan model, the file is not an add-on, the base has the add-on already, a size
            differs, or tensors of the add-on are stored with scales.
    """
    prefix, rename, _ = find_naming(base.path, base.tensors)
    records = {rename(n.removeprefix(prefix)): record for n, record in base.tensors.items() if n.startswith(prefix)}
    transformer = replace(base, tensors={name: record for name, record in records.items() if name is not None})
    with open_checkpoint(os.fspath(path)) as add_on:
        check_add_on(transformer, add_on)
        added = [_record(add_on.path, tensor, prefix) for tensor in add_on.tensors.values()]
    tensors = {**base.tensors, **{record.name: record for record in added}}
    return replace(base, tensors=tensors, parts=base.parts + add_on.identity.parts)


def _record(path: Path, tensor: SourceTensor, prefix: str) -> TensorRecord:
    if not isinstance(tensor, PlainTensor | PackedTensor) or tensor.stored not in QTYPES:
        raise QuantError(
            f"{path}: tensor {tensor.name}: stored as {tensor.stored}, which cannot be mapped;"
            " convert the add-on with Convert to GGUF and choose the result"
        )
    data = tensor.data
    name, qtype = prefix + tensor.name, QTYPES[tensor.stored]
    return TensorRecord(name, qtype, data.shape, data.shape, data.file.path, data.offset, data.nbytes)
