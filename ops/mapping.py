"""Tensor data of a GGUF, mapped the way the host's memory manager wants it."""

from __future__ import annotations

import ctypes
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.memory_management
import torch
from torch import Tensor

from ..quant.gguf_file import open_gguf
from ..quant.gguf_header import Header, TensorRecord, read_header

TensorData = Callable[[TensorRecord], Tensor]
"""A record's bytes, uint8 (*stored_shape[:-1], row_bytes), mapped and not copied."""


def open_mapped(path: str | os.PathLike[str]) -> tuple[Header, TensorData]:
    """Open a GGUF for the host, with dynamic VRAM through its own map, else through a private one that can be pinned.

    Raises:
        QuantError: the file is no well-formed GGUF.
    """
    if not comfy.memory_management.aimdo_enabled:
        file = open_gguf(path)
        return file, lambda record: file.tensors[record.name].data
    header = read_header(path)
    maps = {part.path: _HostMap(part.path) for part in header.parts}
    header.check_unchanged()
    return header, lambda record: maps[record.path].data(record)


class _HostMap:
    """A file that dynamic VRAM can read from disk to the accelerator, by the slice noted on each tensor's storage.

    Source: comfy/utils.py load_safetensors, comfy/memory_management.py TensorFileSlice, ComfyUI 0.30.0.
    """

    def __init__(self, path: Path) -> None:
        # Not at the top: the module takes its library as it is imported, and the host loads that only for dynamic VRAM.
        from comfy_aimdo.model_mmap import ModelMMAP

        self._map = ModelMMAP(os.fspath(path))
        self._handle, self._lock = self._map.get_file_handle(), threading.Lock()
        self._view = memoryview((ctypes.c_uint8 * path.stat().st_size).from_address(self._map.get()))

    def data(self, record: TensorRecord) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            data = torch.frombuffer(self._view[record.offset : record.offset + record.nbytes], dtype=torch.uint8)
        # One storage a tensor, from its first byte to its last: the host ignores slices of any other size.
        file_slice = comfy.memory_management.TensorFileSlice(self._handle, self._lock, record.offset, record.nbytes)
        storage: Any = data.untyped_storage()
        storage._comfy_tensor_file_slice = file_slice
        storage._comfy_tensor_mmap_refs = (self._map, self._view)
        return data.view(record.qtype.packed_shape(record.stored_shape or (1,)))
