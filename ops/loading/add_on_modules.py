"""Add-on modules of Wan (VACE and the like), merged onto a GGUF as it is loaded."""

from __future__ import annotations

import os
from dataclasses import replace

from ...quant import QTYPES, QuantError
from ...quant.gguf.header import Header, TensorRecord
from ...quant.sources.checkpoint import open_checkpoint
from ...quant.sources.modules import check_module
from ...quant.sources.names import WAN_KEY
from ...quant.sources.tensors import PackedTensor, PlainTensor, SourceTensor


def with_module(base: Header, path: str | os.PathLike[str]) -> Header:
    """The header of one model made of a transformer's file and a module's, which may be safetensors.

    Raises:
        QuantError: not a module, one that this transformer has already, of another size, or stored with scales.
    """
    with open_checkpoint(base.path) as transformer, open_checkpoint(os.fspath(path)) as module:
        check_module(transformer, module)
        prefix = next(name.removesuffix(WAN_KEY) for name in base.tensors if name.endswith(WAN_KEY))
        records = [_record(tensor, prefix) for tensor in module.tensors.values()]
    tensors = {**base.tensors, **{record.name: record for record in records}}
    return replace(base, tensors=tensors, parts=base.parts + module.identity.parts)


def _record(tensor: SourceTensor, prefix: str) -> TensorRecord:
    if not isinstance(tensor, PlainTensor | PackedTensor) or tensor.stored not in QTYPES:
        raise QuantError(
            f"module tensor {tensor.name}: stored as {tensor.stored}, which cannot be read in place;"
            " convert the module with Convert to GGUF and choose the result"
        )
    data = tensor.data
    name, qtype = prefix + tensor.name, QTYPES[tensor.stored]
    return TensorRecord(name, qtype, data.shape, data.shape, data.file.path, data.offset, data.nbytes)
