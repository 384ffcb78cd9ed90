"""Wan add-ons (VACE and the like) that are added to a GGUF as it is loaded."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from math import prod
from pathlib import Path

import torch

from ...quant import QTYPES, QuantError
from ...quant.errors import PrintableLog
from ...quant.gguf.header import Header, TensorRecord
from ...quant.sources.add_ons import check_add_on, find_without_layers, part_of_add_on
from ...quant.sources.checkpoint import open_checkpoint
from ...quant.sources.tensors import DTYPES, PackedTensor, PlainTensor, SourceTensor
from ...quant.units import counted
from .wan_header import SourceRecord

_TYPES = {dtype: name for name, dtype in DTYPES.items() if name in QTYPES}

logger = PrintableLog(__name__)


def with_add_on(base: Header, path: str | os.PathLike[str], dtype: torch.dtype = torch.bfloat16) -> Header:
    """Return the header of the model that a transformer and an add-on form.

    Args:
        base: the header of the transformer in the host's names; its file is not opened again.
        path: the path of the add-on, a GGUF or safetensors file.
        dtype: the dtype in which tensors of the add-on are loaded that are stored with scales.

    Raises:
        QuantError: the file is not an add-on, the base has the add-on already, or a size differs.
    """
    with open_checkpoint(os.fspath(path)) as add_on:
        check_add_on(base, add_on)
        added = [_record(add_on.path, tensor, dtype) for tensor in add_on.tensors.values()]
    tensors = {**base.tensors, **{record.name: record for record in added}}
    return replace(base, tensors=tensors, parts=base.parts + add_on.identity.parts)


def check_effect(model: torch.nn.Module, base: Header, whole: Header, path: str | os.PathLike[str]) -> None:
    """Refuse an add-on of which the host's model takes no tensor, or none of a part.

    Args:
        model: the transformer that the host built for `whole`.
        base: the header of the transformer in the host's names.
        whole: what `with_add_on` returned.
        path: the path of the add-on, for the message.

    Raises:
        QuantError: the part, how many tensors have no effect, and what takes such a file if it is known.
    """
    added = [name for name in whole.tensors if name not in base.tensors]
    taken = model.state_dict().keys()
    unused = [name for name in added if name not in taken]
    tensors, without_effect = Counter(map(part_of_add_on, added)), Counter(map(part_of_add_on, unused))
    ignored = [part for part, count in without_effect.items() if count == tensors[part]]
    if ignored:
        known = find_without_layers(unused)
        remedy = f"this is {known.whose}: {known.remedy}" if known else "choose an add-on for the variant of this model"
        raise QuantError(
            f"{os.fspath(path)}: {len(unused)} of {counted(len(added), 'tensor')} would have no effect: ComfyUI's"
            f" {type(model).__name__} has no layers {', '.join(ignored)}; {remedy}"
        )
    if unused:
        logger.warning(
            "%s: %d of %d tensors have no effect, because ComfyUI's %s has no such layers (%s, ...)",
            os.fspath(path),
            len(unused),
            len(added),
            type(model).__name__,
            unused[0],
        )


def warn_of_unused(model: torch.nn.Module, header: Header) -> None:
    """Log the tensors of a GGUF for which the host's model has no layers, if they come from an add-on."""
    names = header.tensors.keys() - model.state_dict().keys()
    useless = find_without_layers(sorted(names))
    if useless:
        logger.warning("%s: %s", header.path, useless)


def _record(path: Path, tensor: SourceTensor, dtype: torch.dtype) -> TensorRecord:
    if not isinstance(tensor, PlainTensor | PackedTensor) or tensor.stored not in QTYPES:
        nbytes = prod(tensor.shape) * dtype.itemsize
        return SourceRecord(tensor.name, QTYPES[_TYPES[dtype]], tensor.shape, tensor.shape, path, 0, nbytes, dtype)
    data, qtype = tensor.data, QTYPES[tensor.stored]
    stored_shape = (prod(data.shape),) if data.shape[-1:] and data.shape[-1] % qtype.block_size else data.shape
    return TensorRecord(tensor.name, qtype, data.shape, stored_shape, data.file.path, data.offset, data.nbytes)
