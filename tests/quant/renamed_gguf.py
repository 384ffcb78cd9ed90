"""Shared by tests of files of other tools: a GGUF under other names of its tensors."""

from __future__ import annotations

from wanquant.quant import open_gguf
from wanquant.quant.gguf.layout import TensorSpec
from wanquant.quant.gguf.writer import GGUFWriter


def renamed_gguf(path, gguf, rename):
    """Write the tensors of a GGUF under other names, and return the path."""
    tensors = open_gguf(gguf).tensors.values()
    specs = [TensorSpec(rename(tensor.name), tensor.qtype, tensor.shape) for tensor in tensors]
    with GGUFWriter(path, {"general.architecture": "wan"}, specs) as writer:
        for tensor in tensors:
            writer.write(rename(tensor.name), tensor.data)
    return path
