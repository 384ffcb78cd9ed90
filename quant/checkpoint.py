"""Source checkpoints: safetensors or float GGUF, read piece by piece with plain file reads, never mapped."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from .errors import QuantError
from .gguf_header import FileIdentity, read_header
from .provenance import source_metadata
from .safetensors_header import MAX_HEADER_BYTES, Entry, read_safetensors_header

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_HASH_CHUNK_BYTES = 16 << 20
_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "model.model.", "net.", "model.")
_WAN_KEY = "head.modulation"
_PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
_PICKLE_MAGICS = (b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(2, 6)))

_LOOKS_LIKE = (
    (("lora_A.", "lora_B.", "lora_down.", "lora_up."), "a LoRA"),
    (("condition_embedder.",), "a Wan model in Diffusers' tensor names"),
    (("encoder.block.", "encoder.layers.", "text_model."), "a text encoder"),
    (("vision_model.", "visual."), "a vision encoder"),
    (("decoder.head.", "decoder.conv_in.", "decoder.up."), "a VAE"),
    (("double_blocks.",), "a Flux or Hunyuan model"),
    (("input_blocks.", "joint_blocks."), "a Stable Diffusion model"),
    (("transformer_blocks.",), "another diffusion transformer"),
)


class HashedFile:
    """A file read at any offset; the bytes that are reached in order also feed one SHA-256 of the whole file."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 - closed by close()
        self._hash = hashlib.sha256()
        self._hashed = 0

    def read(self, offset: int, nbytes: int) -> Tensor:
        """uint8 (nbytes,), a fresh tensor."""
        if offset > self._hashed:
            self._hash_until(offset)
        data = self._read(offset, nbytes)
        if offset == self._hashed:
            self._hash.update(data.numpy().data)
            self._hashed += nbytes
        return data

    def sha256(self) -> str:
        """Hex digest of the whole file; reads what was not read yet."""
        self._hash_until(self._file.seek(0, 2))
        return self._hash.hexdigest()

    def close(self) -> None:
        self._file.close()

    def _hash_until(self, offset: int) -> None:
        while self._hashed < offset:
            chunk = self._read(self._hashed, min(offset - self._hashed, _HASH_CHUNK_BYTES))
            self._hash.update(chunk.numpy().data)
            self._hashed += len(chunk)

    def _read(self, offset: int, nbytes: int) -> Tensor:
        data = torch.empty(nbytes, dtype=torch.uint8)
        self._file.seek(offset)
        if self._file.readinto(data.numpy().data) != nbytes:
            raise QuantError(
                f"{self._file.name}: ends before byte {offset + nbytes}; the file changed while it was read"
            )
        return data


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of a checkpoint; its values stay in the file until they are read."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    file: HashedFile = field(repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Values `start` to `stop` in row-major order: a flat tensor of `dtype`."""
        stop = math.prod(self.shape) if stop is None else stop
        size = self.dtype.itemsize
        return self.file.read(self.offset + start * size, (stop - start) * size).view(self.dtype)


@dataclass(frozen=True)
class Checkpoint:
    """An open source file. `tensors` are in file order, under ComfyUI's names without prefix."""

    identity: FileIdentity
    metadata: Mapping[str, str]
    tensors: Mapping[str, SourceTensor]
    file: HashedFile = field(repr=False, compare=False)

    @property
    def path(self) -> Path:
        return self.identity.path

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most weights."""
        weights: Counter[torch.dtype] = Counter()
        for tensor in self.tensors.values():
            weights[tensor.dtype] += math.prod(tensor.shape)
        return weights.most_common(1)[0][0]

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a Wan checkpoint in F32, F16 or BF16: safetensors, or a GGUF that holds nothing else.

    Raises:
        QuantError: no such file, a pickle, a damaged header, not a Wan model, or an unsupported dtype.
    """
    path = Path(path)
    if not path.is_file():
        raise QuantError(f"{path}: no such file; give the path of a .safetensors checkpoint")
    identity = FileIdentity.of(path)
    try:
        metadata, entries = _read_entries(path)
        tensors = _wan_tensors(path, entries)
        file = HashedFile(path)
    except OSError as error:
        raise QuantError(f"{path}: cannot be read ({error.strerror})") from error
    sources = {e.name: SourceTensor(e.name, DTYPES[e.dtype], e.shape or (1,), e.begin, file) for e in tensors}
    return Checkpoint(identity, metadata, sources, file)


def _read_entries(path: Path) -> tuple[dict[str, str], list[Entry]]:
    with open(path, "rb") as file:
        magic = file.read(8)
    # A small safetensors header length can look like a pickle's first bytes.
    is_pickle = magic.startswith(_PICKLE_MAGICS) and int.from_bytes(magic, "little") > MAX_HEADER_BYTES
    if is_pickle or path.suffix.lower() in _PICKLE_SUFFIXES:
        raise QuantError(
            f"{path}: a PyTorch pickle ({path.suffix or 'no suffix'}), which can run code when opened;"
            " save it as .safetensors and convert that"
        )
    return _gguf_entries(path) if magic[:4] == b"GGUF" else read_safetensors_header(path)


def _gguf_entries(path: Path) -> tuple[dict[str, str], list[Entry]]:
    header = read_header(path)
    if len(header.parts) > 1:
        raise QuantError(f"{path}: a split GGUF cannot be converted; merge its {len(header.parts)} parts into one file")
    entries = [Entry(t.name, t.qtype.name, t.shape, t.offset, t.offset + t.nbytes) for t in header.tensors.values()]
    return source_metadata(header.metadata), sorted(entries, key=lambda entry: entry.begin)


def _wan_tensors(path: Path, entries: list[Entry]) -> list[Entry]:
    """The transformer's tensors without their prefix; what lies outside it (a VAE, a text encoder) is left out."""
    names = {entry.name for entry in entries}
    prefix = next((prefix for prefix in _PREFIXES if prefix + _WAN_KEY in names), None)
    if prefix is None:
        looks = next(
            (what for keys, what in _LOOKS_LIKE if any(key in n for n in names for key in keys)), "something else"
        )
        raise QuantError(
            f"{path}: not a Wan model (no tensor {_WAN_KEY}): it looks like {looks}; only Wan is supported"
        )
    tensors = [entry._replace(name=entry.name[len(prefix) :]) for entry in entries if entry.name.startswith(prefix)]
    for entry in tensors:
        if entry.dtype not in DTYPES:
            raise QuantError(
                f"{path}: tensor {entry.name}: dtype {entry.dtype} cannot be converted, only {', '.join(DTYPES)};"
                " use the full-precision checkpoint"
            )
    return tensors
