"""The hidden states between two blocks, of all captured calls, on the disk.

Two chains run side by side: the unquantized blocks and the quantized ones. The states before a block are kept until the
block is in the file, so that a tuning can stop at any time and continue there.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import QuantError
from ..files.atomic_file import AtomicFile
from ..files.safetensors_content import SafetensorsContent, StreamedTensor
from ..files.safetensors_header import read_safetensors_header
from ..sources.files import HashedFile
from .capture import CapturedCalls

_KEY = "wanquant.tuning"
"""The fingerprint of the tuning that the states belong to."""

ReadState = Callable[[int], Tensor]
"""Returns the hidden state of a call: float32, (batch, tokens, channels), on the CPU."""


class Chains(NamedTuple):
    """The states before one block in the unquantized and in the quantized chain."""

    exact: ReadState
    quantized: ReadState


class StateFolder:
    """The states of one tuning, in a folder beside its file.

    Args:
        path: the file that is made.
        fingerprint: of the tuning; states of another one are not used.
    """

    def __init__(self, path: Path, fingerprint: str, calls: CapturedCalls) -> None:
        self.folder = path.with_name(f".{path.name}.tuning")
        self._fingerprint, self._calls = fingerprint, calls
        self._open: list[HashedFile] = []

    @property
    def missing_bytes(self) -> int:
        """The bytes that the folder will need in addition to those that it has."""
        of_a_chain = sum(4 * math.prod(self._calls.shape(index)) for index in range(len(self._calls)))
        held = sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))
        # The states before a block and those after it, in both chains.
        return max(0, 4 * of_a_chain - held)

    def has(self, block: int) -> bool:
        """Return whether both chains have arrived at this block; at the first one they always have."""
        return block == 0 or all(self._is_own(self._path(block, which)) for which in Chains._fields)

    def before(self, block: int) -> Chains:
        """Return the states before a block."""
        self.close()
        if block == 0:
            return Chains(self._calls.hidden, self._calls.hidden)
        return Chains(*(self._reader(self._path(block, which)) for which in Chains._fields))

    def write(self, block: int, exact: ReadState, quantized: ReadState) -> None:
        """Write the states before a block; the functions compute them one by one.

        Raises:
            QuantError: the disk is full, or the folder cannot be written.
        """
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise QuantError(f"{self.folder}: cannot be made: {error.strerror}; choose another folder") from None
        for which, state in zip(Chains._fields, (exact, quantized), strict=True):
            content = SafetensorsContent(self._streamed(state), {_KEY: self._fingerprint})
            with AtomicFile(self._path(block, which), content.nbytes, overwrite=True) as file:
                content.write(file)
                file.commit()

    def keep_only(self, block: int) -> None:
        """Delete the states before all other blocks."""
        kept = {self._path(block, which) for which in Chains._fields}
        for path in self.folder.glob("*.safetensors"):
            if path not in kept:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        for file in self._open:
            file.close()
        self._open.clear()

    def delete(self) -> None:
        """Delete the folder."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, block: int, which: str) -> Path:
        return self.folder / f"{block:03}-{which}.safetensors"

    def _is_own(self, path: Path) -> bool:
        try:
            metadata, entries = read_safetensors_header(path)
        except QuantError:
            return False
        return metadata.get(_KEY) == self._fingerprint and len(entries) == len(self._calls)

    def _streamed(self, state: ReadState) -> Iterable[StreamedTensor]:
        def pieces(index: int) -> Callable[[], Iterable[Tensor]]:
            return lambda: (state(index).cpu(),)

        for index in range(len(self._calls)):
            yield StreamedTensor(f"{index:06}", torch.float32, self._calls.shape(index), pieces(index))

    def _reader(self, path: Path) -> ReadState:
        file = HashedFile(path)
        self._open.append(file)
        entries = {int(entry.name): entry for entry in read_safetensors_header(path)[1]}

        def read(index: int) -> Tensor:
            entry = entries[index]
            values = file.peek(entry.begin, entry.end - entry.begin)
            return values.view(torch.float32).view(entry.shape)

        return read
