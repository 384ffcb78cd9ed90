"""Maps the tensor data of files in the way that the host's memory manager expects."""

from __future__ import annotations

import ctypes
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...quant.errors import PrintableLog
from ...quant.gguf.file_identity import FileIdentity
from ...quant.gguf.header import Header, TensorRecord
from ...quant.gguf.reader import map_private
from .. import host

logger = PrintableLog(__name__)

TensorData = Callable[[TensorRecord], Tensor]
"""Returns the mapped bytes of a record without a copy: uint8, (*stored_shape[:-1], row_bytes)."""


def map_files(parts: Sequence[FileIdentity], *, dynamic: bool = True) -> TensorData:
    """Map files of any format.

    With dynamic VRAM the host's own map is used. It is read-only, so CUDA cannot pin it. The legacy memory mode gets a
    private map, which CUDA can pin.

    Args:
        parts: the files.
        dynamic: False for a model in the legacy memory mode.

    Raises:
        QuantError: a file cannot be mapped, or has changed since its records were read.
    """
    streams = dynamic and host.dynamic_vram()
    maps = {part.path: _HostMap(part.path) if streams else _PrivateMap(part) for part in parts}
    for part in parts:
        part.check_unchanged()
    return lambda record: maps[record.path].data(record)


class _PrivateMap:
    def __init__(self, part: FileIdentity) -> None:
        self._bytes = map_private(part)

    def data(self, record: TensorRecord) -> Tensor:
        packed = self._bytes[record.offset : record.offset + record.nbytes]
        return packed.view(record.qtype.packed_shape(record.stored_shape or (1,)))


def change_warning(header: Header) -> Callable[[object], None]:
    """Return a callback for the start of each run that warns once if a loaded file was deleted or replaced.

    The mapping stays valid then. The callback raises QuantError if the file was written to, which changes the weights.
    """
    warned: set[Path] = set()

    def check(_: object) -> None:
        for part in header.parts:
            what = part.displaced()
            if what and part.path not in warned:
                warned.add(part.path)
                logger.warning(
                    "%s was %s since it was loaded; the weights of the old file stay in use until it is loaded again",
                    part.path,
                    what,
                )

    return check


class _HostMap:
    """The map of a file that dynamic VRAM can read from disk to the accelerator.

    Source: comfy/utils.py load_safetensors, ComfyUI 0.30.0.
    """

    def __init__(self, path: Path) -> None:
        self._map, self._lock = host.map_file(path), threading.Lock()
        self._handle = self._map.get_file_handle()
        self._view = memoryview((ctypes.c_uint8 * path.stat().st_size).from_address(self._map.get()))

    def data(self, record: TensorRecord) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            data = torch.frombuffer(self._view[record.offset : record.offset + record.nbytes], dtype=torch.uint8)
        host.annotate_slice(data, self._handle, self._lock, record.offset, (self._map, self._view))
        return data.view(record.qtype.packed_shape(record.stored_shape or (1,)))
