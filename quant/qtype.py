"""QuantType: one ggml tensor type as a frozen value, and QTYPES, all of them by ggml's name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from .encoders import ggml as reference
from .encoders import search
from .errors import QuantError
from .formats import iq4, iquants, kquants, legacy, microscaling, ternary

Effort = Literal["fast", "best"]
_EFFORTS: tuple[Effort, ...] = get_args(Effort)
Decode = Callable[[Tensor], Tensor]
"""(n, type_size) uint8 -> (n, block_size) float32."""
Encode = Callable[[Tensor, "Tensor | None"], Tensor]
"""(n, block_size) float32 weights, the same shape of importance or None -> (n, type_size) uint8."""

# On a CPU the temporaries stay in its cache; an accelerator prefers few launches, but a search keeps about 40 float32
# temporaries of its input: 640 MiB.
_CPU_WEIGHTS = 1 << 18
_DEVICE_WEIGHTS = 1 << 22


@dataclass(frozen=True)
class QuantType:
    """A ggml tensor type: `block_size` weights stored in `type_size` bytes."""

    name: str
    ggml_type: int
    block_size: int
    type_size: int
    decode: Decode = field(repr=False, compare=False)
    fast: Encode | None = field(default=None, repr=False, compare=False)
    best: Encode | None = field(default=None, repr=False, compare=False)
    factors: tuple[int, ...] = field(default=(), repr=False)
    """Where in a block its float16 factors lie, in which all of its weights are linear."""

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.type_size / self.block_size

    @property
    def efforts(self) -> tuple[Effort, ...]:
        """The efforts that `quantize` has an encoder for; empty for a type that can only be read."""
        return tuple(effort for effort in _EFFORTS if getattr(self, effort))

    def packed_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in bytes of a tensor of `shape` weights: only the last axis changes."""
        if not shape or shape[-1] % self.block_size:
            raise QuantError(
                f"shape {shape}: the last axis is not a multiple of the {self.name} block size {self.block_size};"
                " choose a type with smaller blocks"
            )
        return (*shape[:-1], shape[-1] // self.block_size * self.type_size)

    def unpacked_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in weights of packed bytes of `shape`, the inverse of `packed_shape`."""
        if not shape or shape[-1] % self.type_size:
            raise QuantError(
                f"shape {shape} in bytes: the last axis is not a multiple of the {self.name} type size"
                f" {self.type_size}; the data is cut or of another type"
            )
        return (*shape[:-1], shape[-1] // self.type_size * self.block_size)

    def dequantize(self, packed: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Decode in float32 arithmetic, rounded once to `dtype`.

        Args:
            packed: uint8, (..., n_blocks * type_size), on any device.

        Returns:
            `dtype`, (..., n_blocks * block_size), a fresh tensor on the same device.

        Raises:
            QuantError: not uint8, or a row that is no multiple of the type size.
        """
        if packed.dtype != torch.uint8:
            raise QuantError(f"{self.name}: packed data is {packed.dtype}, expected torch.uint8; view it as bytes")
        self.unpacked_shape(tuple(packed.shape))
        # By name, as the operator's module (quant/torch_op.py) imports this one.
        weight: Tensor = torch.ops.wanquant.dequantize(packed, self.name, dtype)
        return weight

    def quantize(self, weight: Tensor, importance: Tensor | None = None, effort: Effort = "best") -> Tensor:
        """Encode to uint8 (..., n_blocks * type_size) on the weight's device.

        Args:
            weight: floating point, (..., n), n a multiple of `block_size`.
            importance: float, (n,), the weight of each input column in the squared error, at least 0.
            effort: "best" minimises the squared error; "fast" is ggml's own encoding without importance, bit for bit.
                With importance both are "best"; types that have no such encoder ignore it.

        Raises:
            QuantError: no encoder for this type, a row that is no multiple of the block size, or importance that does
                not fit the weight.
        """
        encode = self.encoder(effort)
        if importance is not None and self.best:
            encode = self.best
        if not weight.is_floating_point():
            raise QuantError(f"{self.name}: weight is {weight.dtype}, expected floating point; convert it first")
        out = torch.empty(self.packed_shape(tuple(weight.shape)), dtype=torch.uint8, device=weight.device)
        n_blocks = weight.numel() // self.block_size
        blocks, packed = weight.reshape(n_blocks, self.block_size), out.view(n_blocks, self.type_size)
        columns = None if importance is None else self._columns(importance, weight)
        if encode is self.fast and weight.device.type == "cpu" and _encoded_by_ggml(self, blocks, packed):
            return out
        for chunk in self._chunks(n_blocks, weight.device):
            packed[chunk] = encode(blocks[chunk].float().contiguous(), None if columns is None else columns(chunk))
        return out

    def encoder(self, effort: str) -> Encode:
        """What encodes blocks; QuantError if there is no such effort, or none for this type."""
        if effort not in _EFFORTS:
            raise QuantError(f"{self.name}: unknown effort {effort!r}; choose from {', '.join(_EFFORTS)}")
        encode = self.best if effort == "best" else self.fast
        if encode is None:
            writable = ", ".join(qtype.name for qtype in QTYPES.values() if effort in qtype.efforts)
            raise QuantError(f"{self.name}: no {effort} encoder; choose from {writable}")
        return encode

    def _columns(self, importance: Tensor, weight: Tensor) -> Callable[[slice], Tensor]:
        """The importance of a chunk of blocks, (n, block_size) float32: it repeats with every row of the weight."""
        if importance.shape != weight.shape[-1:]:
            raise QuantError(
                f"{self.name}: importance of shape {tuple(importance.shape)}, expected {tuple(weight.shape[-1:])},"
                " one value for each input column; it belongs to another tensor"
            )
        if not importance.is_floating_point() or bool((importance < 0).any()):
            raise QuantError(f"{self.name}: importance must be floating point and at least 0; it is a mean of squares")
        row = importance.to(weight.device, torch.float32).view(-1, self.block_size)
        return lambda chunk: row[torch.arange(chunk.start, chunk.stop, device=row.device) % len(row)]

    def _chunks(self, n_blocks: int, device: torch.device) -> Iterator[slice]:
        step = max(1, weights_at_a_time(device) // self.block_size)
        for start in range(0, n_blocks, step):
            yield slice(start, min(start + step, n_blocks))


def _encoded_by_ggml(qtype: QuantType, blocks: Tensor, packed: Tensor) -> bool:
    """Whether ggml's own C code could, and has: where its library is installed and encodes as `fast`."""
    try:
        from .kernels import libggml  # which imports this module
    except (ImportError, OSError):
        return False
    return libggml.quantize(qtype, blocks, packed)


def weights_at_a_time(device: torch.device) -> int:
    """How many weights to encode in one go."""
    return _CPU_WEIGHTS if device.type == "cpu" else _DEVICE_WEIGHTS


def qtype_of(ggml_type: int) -> QuantType:
    """The type that a GGUF file means by `ggml_type`; QuantError if there is none."""
    if ggml_type not in QTYPES_BY_ID:
        known = ", ".join(f"{number} {qtype.name}" for number, qtype in sorted(QTYPES_BY_ID.items()))
        raise QuantError(
            f"ggml type {ggml_type} is unknown; the known types are {known}; the file may need a newer WanQuant"
        )
    return QTYPES_BY_ID[ggml_type]


_TYPES = (
    QuantType("F32", 0, 1, 4, legacy.decode_f32, legacy.encode_f32, legacy.encode_f32),
    QuantType("F16", 1, 1, 2, legacy.decode_f16, legacy.encode_f16, legacy.encode_f16),
    QuantType("BF16", 30, 1, 2, legacy.decode_bf16, legacy.encode_bf16, legacy.encode_bf16),
    QuantType("Q4_0", 2, 32, 18, legacy.decode_q4_0, legacy.encode_q4_0, search.best_q4_0, (0,)),
    QuantType("Q4_1", 3, 32, 20, legacy.decode_q4_1, legacy.encode_q4_1, search.best_q4_1, (0, 2)),
    QuantType("Q5_0", 6, 32, 22, legacy.decode_q5_0, legacy.encode_q5_0, search.best_q5_0, (0,)),
    QuantType("Q5_1", 7, 32, 24, legacy.decode_q5_1, legacy.encode_q5_1, search.best_q5_1, (0, 2)),
    QuantType("Q8_0", 8, 32, 34, legacy.decode_q8_0, legacy.encode_q8_0, search.best_q8_0, (0,)),
    QuantType("Q2_K", 10, 256, 84, kquants.decode_q2_k, reference.encode_q2_k, search.best_q2_k, (80, 82)),
    QuantType("Q3_K", 11, 256, 110, kquants.decode_q3_k, reference.encode_q3_k, search.best_q3_k, (108,)),
    QuantType("Q4_K", 12, 256, 144, kquants.decode_q4_k, reference.encode_q4_k, search.best_q4_k, (0, 2)),
    QuantType("Q5_K", 13, 256, 176, kquants.decode_q5_k, reference.encode_q5_k, search.best_q5_k, (0, 2)),
    QuantType("Q6_K", 14, 256, 210, kquants.decode_q6_k, reference.encode_q6_k, search.best_q6_k, (208,)),
    QuantType("IQ4_NL", 20, 32, 18, iq4.decode_iq4_nl, reference.encode_iq4_nl, search.best_iq4_nl, (0,)),
    QuantType("IQ4_XS", 23, 256, 136, iq4.decode_iq4_xs, reference.encode_iq4_xs, search.best_iq4_xs, (0,)),
    QuantType("IQ1_S", 19, 256, 50, iquants.decode_iq1_s),
    QuantType("IQ1_M", 29, 256, 56, iquants.decode_iq1_m),
    QuantType("IQ2_XXS", 16, 256, 66, iquants.decode_iq2_xxs),
    QuantType("IQ2_XS", 17, 256, 74, iquants.decode_iq2_xs),
    QuantType("IQ2_S", 22, 256, 82, iquants.decode_iq2_s),
    QuantType("IQ3_XXS", 18, 256, 98, iquants.decode_iq3_xxs),
    QuantType("IQ3_S", 21, 256, 110, iquants.decode_iq3_s),
    QuantType("TQ1_0", 34, 256, 54, ternary.decode_tq1_0, ternary.encode_tq1_0),
    QuantType("TQ2_0", 35, 256, 66, ternary.decode_tq2_0, ternary.encode_tq2_0),
    QuantType("MXFP4", 39, 32, 17, microscaling.decode_mxfp4, microscaling.encode_mxfp4),
    QuantType("NVFP4", 40, 64, 36, microscaling.decode_nvfp4),
)
QTYPES: dict[str, QuantType] = {qtype.name: qtype for qtype in _TYPES}
QTYPES_BY_ID: dict[int, QuantType] = {qtype.ggml_type: qtype for qtype in _TYPES}
