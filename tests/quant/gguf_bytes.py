"""GGUF bytes made from raw fields, so that tests can write files that no real writer would."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

U8, U32, F32, STRING, ARRAY = 0, 4, 6, 8, 9


def name(text: str | bytes) -> bytes:
    encoded = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(encoded)) + encoded


def pair(key: str | bytes, type_id: int, payload: bytes) -> bytes:
    return name(key) + struct.pack("<I", type_id) + payload


def array(item_type: int, count: int, payload: bytes = b"") -> bytes:
    return struct.pack("<IQ", item_type, count) + payload


@dataclass(frozen=True)
class RawTensor:
    """A tensor record with `dims` in ggml's order and `offset` from the start of the data section."""

    name: str | bytes = "w"
    dims: Sequence[int] = (32, 2)
    type_id: int = 8
    offset: int = 0

    def pack(self) -> bytes:
        dims = struct.pack(f"<I{len(self.dims)}Q", len(self.dims), *self.dims)
        return name(self.name) + dims + struct.pack("<IQ", self.type_id, self.offset)


@dataclass(frozen=True)
class RawGGUF:
    """The parts of a GGUF, by default a valid one with a Q8_0 tensor (2, 32) and an F32 tensor (2, 2)."""

    magic: bytes = b"GGUF"
    version: int = 3
    pairs: Sequence[bytes] = (
        pair("general.architecture", STRING, name("wan")),
        pair("tokens", ARRAY, array(STRING, 2, name("a") + name("bc"))),
        pair("scores", ARRAY, array(F32, 2, struct.pack("<2f", 1, 2))),
    )
    tensors: Sequence[RawTensor] = (RawTensor(), RawTensor("b", (2, 2), 0, 96))
    data: bytes = bytes(96 + 16)
    n_tensors: int | None = None
    n_pairs: int | None = None

    def pack(self) -> bytes:
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        n_pairs = len(self.pairs) if self.n_pairs is None else self.n_pairs
        head = self.magic + struct.pack("<IQQ", self.version, n_tensors, n_pairs)
        head += b"".join(self.pairs) + b"".join(tensor.pack() for tensor in self.tensors)
        return head.ljust(-(-len(head) // 32) * 32, b"\0") + self.data

    def with_pairs(self, *pairs: bytes) -> RawGGUF:
        return replace(self, pairs=(*self.pairs, *pairs))

    def with_tensor(self, **fields: object) -> RawGGUF:
        return replace(self, tensors=(replace(self.tensors[0], **fields), *self.tensors[1:]))  # type: ignore[arg-type]
