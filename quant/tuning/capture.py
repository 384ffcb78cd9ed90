"""Captures: the arguments of a few calls of a model's first block, and their file.

All blocks of a Wan transformer get the same arguments, except for the hidden state, which is the output of the block
before. So the calls of the first block are all that is needed to run any block later, without the rest of the model.

A file is safetensors. The argument `name` of call 7 is the tensor `7.name`, in the dtype of the model. Numbers are in
the metadata.
"""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import PrintableLog, QuantError
from ..files.atomic_file import AtomicFile
from ..files.disk_space import check_space
from ..files.safetensors_content import SafetensorsContent, StreamedTensor
from ..files.safetensors_header import TensorEntry, read_safetensors_header
from ..files.strict_json import parse_json
from ..sources.files import HashedFile
from ..sources.tensors import DTYPES, NUMBERS
from ..units import GIB

_log = PrintableLog(__name__)

HIDDEN = "x"
"""The argument of a block that is its hidden state: floating point, (batch, tokens, channels)."""
SIGNATURE = "signature"
"""The tensor of a file by which its model is recognized: F32, (blocks, values)."""

_KEY = "wanquant.capture"
"""JSON: for every call, {argument: number or null}."""
_HOW = "capture anew with Collect Importance Matrix and its input blocks"

_DTYPES = DTYPES | NUMBERS

Arguments = dict[str, Any]
"""The arguments of a call by name: tensors, and numbers or None."""


class Capture:
    """A random few of a model's evaluations, within a number of bytes; each is a temporary file until it is saved.

    Every evaluation has the same chance to stay, however many there will be.

    Args:
        parent: the folder in which a temporary one is made. It is deleted together with this object.
        max_bytes: of all kept calls.

    Raises:
        QuantError: the disk has less space.
    """

    def __init__(self, parent: Path, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        check_space({parent / "capture": max_bytes})
        self._folder = tempfile.TemporaryDirectory(prefix="wanquant-", dir=parent, ignore_cleanup_errors=True)
        self.seen = 0
        """The number of calls so far."""
        self.signature: Tensor | None = None
        self._kept: list[_Kept] = []
        # The same evaluations stay if the same graph runs again.
        self._random = random.Random(0)

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, arguments: Arguments, signature: Tensor) -> None:
        """Consider one call.

        Args:
            arguments: by name; tensors of any dtype, shape and device. `HIDDEN` is among them.
            signature: float32, (blocks, values), of the model.

        Raises:
            QuantError: an argument of another kind, a call larger than all that may be kept, or a disk that is full.
        """
        tensors, scalars = _split(arguments)
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        if nbytes > self.max_bytes:
            raise QuantError(
                f"capture: one evaluation has {nbytes / GIB:.2f} GiB, expected at most {self.max_bytes / GIB:.2f};"
                " allow more, or sample a smaller or shorter video"
            )
        if not self.seen:
            _log.info("Captures up to %d evaluations of %.3f GiB each", self.max_bytes // nbytes, nbytes / GIB)
        self.signature = signature
        rank, path = self._random.random(), Path(self._folder.name) / f"{self.seen}.safetensors"
        self.seen += 1
        if self._room(rank, nbytes):
            try:
                save_file({name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}, path)
            except (OSError, SafetensorError) as error:
                raise QuantError(f"{path}: cannot be written: {error}; free some space on this disk") from None
            self._kept.append(_Kept(rank, nbytes, path, scalars, {name: _like(t) for name, t in tensors.items()}))

    def write(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the kept calls to a file, and return its path, which can differ: see `AtomicFile.commit`.

        Raises:
            QuantError: nothing was captured, or the file cannot be written.
        """
        if self.signature is None or not self._kept:
            raise QuantError(
                "capture: nothing captured yet, expected at least one evaluation; sample with the model output of"
                " Collect Importance Matrix before saving"
            )
        kept = sorted(self._kept, key=lambda one: int(one.path.stem))
        tensors = [StreamedTensor.whole(SIGNATURE, self.signature)]
        tensors += [one.streamed(index, name) for index, one in enumerate(kept) for name in one.like]
        content = SafetensorsContent(tensors, {_KEY: json.dumps([one.scalars for one in kept])})
        with AtomicFile(Path(path), content.nbytes, overwrite=overwrite) as file:
            content.write(file)
            return file.commit()

    def _room(self, rank: float, nbytes: int) -> bool:
        """Drop kept calls of lower rank until another one fits; return False if that one has too low a rank itself."""
        self._kept.sort(key=lambda one: one.rank, reverse=True)
        free = self.max_bytes - sum(one.nbytes for one in self._kept)
        while free < nbytes:
            if self._kept[-1].rank > rank:
                return False
            dropped = self._kept.pop()
            dropped.path.unlink(missing_ok=True)
            free += dropped.nbytes
        return True


@dataclass(frozen=True)
class _Kept:
    rank: float
    nbytes: int
    path: Path
    scalars: Mapping[str, object]
    like: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

    def streamed(self, index: int, name: str) -> StreamedTensor:
        return StreamedTensor(f"{index}.{name}", *self.like[name], lambda: (load_file(self.path)[name],))


@dataclass(frozen=True)
class CapturedCalls:
    """The calls in a file, which are read one at a time."""

    path: Path
    signature: Tensor
    """float32, (blocks, values)."""
    _file: HashedFile = field(repr=False)
    _entries: Mapping[str, TensorEntry] = field(repr=False)
    _scalars: list[dict[str, object]] = field(repr=False)

    @classmethod
    def open(cls, path: str | Path) -> CapturedCalls:
        """Open a file that `Capture.write` has written.

        Raises:
            QuantError: not such a file, or one without calls.
        """
        path = Path(path)
        metadata, entries = read_safetensors_header(path)
        described: Any = parse_json(metadata.get(_KEY, "null"), f"{path}: {_KEY}", _HOW)
        scalars = described if isinstance(described, list) and all(map(_are_scalars, described)) else []
        by_name = {entry.name: entry for entry in entries if entry.dtype in _DTYPES}
        hidden = [by_name.get(f"{index}.{HIDDEN}") for index in range(len(scalars))]
        are_states = all(entry is not None and len(entry.shape) == 3 for entry in hidden)
        signature = by_name.get(SIGNATURE)
        if not scalars or not are_states or len(by_name) < len(entries) or not _is_matrix(signature):
            raise QuantError(f"{path}: not a capture of a model's blocks (no valid {_KEY} in its metadata); {_HOW}")
        file = HashedFile(path)
        try:
            return cls(path, _read(file, by_name[SIGNATURE]).float(), file, by_name, scalars)
        except QuantError:
            file.close()
            raise

    def __len__(self) -> int:
        return len(self._scalars)

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the file, in hexadecimal."""
        with open(self.path, "rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 24):
                digest.update(chunk)
        return digest.hexdigest()

    @property
    def channels(self) -> int:
        """The channels of the hidden state."""
        return self._entries[f"0.{HIDDEN}"].shape[-1]

    def shape(self, index: int) -> tuple[int, ...]:
        """Return the shape of the hidden state of a call."""
        return self._entries[f"{index}.{HIDDEN}"].shape

    def hidden(self, index: int) -> Tensor:
        """Return the hidden state of a call: float32, (batch, tokens, channels)."""
        return _read(self._file, self._entries[f"{index}.{HIDDEN}"]).float()

    def others(self, index: int, device: torch.device) -> Arguments:
        """Return the other arguments of a call, floating point ones as float32."""
        return {**self._scalars[index], **dict(self._others(index, device))}

    def close(self) -> None:
        self._file.close()

    def _others(self, index: int, device: torch.device) -> Iterator[tuple[str, Tensor]]:
        for name, entry in self._entries.items():
            number, _, argument = name.partition(".")
            if number == str(index) and argument != HIDDEN:
                tensor = _read(self._file, entry).to(device)
                yield argument, tensor.float() if tensor.is_floating_point() else tensor


def _are_scalars(described: object) -> bool:
    return isinstance(described, dict) and all(isinstance(value, int | float | None) for value in described.values())


def _is_matrix(entry: TensorEntry | None) -> bool:
    return entry is not None and len(entry.shape) == 2


def _read(file: HashedFile, entry: TensorEntry) -> Tensor:
    values = file.peek(entry.begin, entry.end - entry.begin).view(_DTYPES[entry.dtype]).view(entry.shape)
    if values.is_floating_point() and not bool(values.isfinite().all()):
        raise QuantError(f"{file.path}: tensor {entry.name}: holds NaN or infinity, expected finite numbers; {_HOW}")
    return values


def _like(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...]]:
    return tensor.dtype, tuple(tensor.shape)


def _split(arguments: Arguments) -> tuple[dict[str, Tensor], dict[str, object]]:
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    scalars = {name: value for name, value in arguments.items() if name not in tensors}
    for name, value in scalars.items():
        if not isinstance(value, int | float | None):
            raise QuantError(
                f"capture: the blocks of this model get {name} as {type(value).__name__}, expected tensors and numbers;"
                " tuning does not know this model, convert it without"
            )
    return tensors, scalars
