"""QuantType: one ggml tensor type as a frozen value, and QTYPES, all of them by ggml's name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass, field
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from .encoders import ggml
from .encoders.search import encoders as search
from .errors import QuantError
from .formats import iq4, iquants, kquants, legacy, microscaling, ternary
from .formats.bits import BlockLayout
from .kernels.optional import GGML

Effort = Literal["fast", "best"]
_EFFORTS: tuple[Effort, ...] = get_args(Effort)
Conversion = Literal["dequantize", "quantize"]
DequantizeBlocks = Callable[[Tensor], Tensor]
"""(n, type_size) uint8 -> (n, block_size) float32."""
EncodeBlocks = Callable[[Tensor, "Tensor | None"], Tensor]
"""(n, block_size) float32, importance of the same shape or None -> (n, type_size) uint8."""

# On a CPU the temporaries stay in its cache; an accelerator prefers few launches, but a search keeps about 40 float32
# temporaries of its input: 640 MiB.
_CPU_WEIGHTS = 1 << 18
_DEVICE_WEIGHTS = 1 << 22


@dataclass(frozen=True)
class QuantType:
    """A ggml tensor type: every `block_size` elements are stored in `type_size` bytes."""

    _: KW_ONLY
    name: str
    ggml_type: int
    """The number that GGUF files use. Source: ggml.h enum ggml_type."""
    block: BlockLayout
    dequantize_blocks: DequantizeBlocks = field(repr=False, compare=False)
    fast: EncodeBlocks | None = field(default=None, repr=False, compare=False)
    """Encoder that writes ggml's own bytes."""
    best: EncodeBlocks | None = field(default=None, repr=False, compare=False)
    """Encoder that searches for the least squared error."""
    slower_in_c: tuple[Conversion, ...] = field(default=(), repr=False)
    """What ggml's C code does more slowly than the torch operations."""

    @property
    def block_size(self) -> int:
        return self.block.size

    @property
    def type_size(self) -> int:
        return self.block.nbytes

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
        # The operator is called by name: its module, quant/torch_op.py, imports this one.
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
        if encode is self.fast and weight.device.type == "cpu" and GGML.quantize(self, blocks, packed):
            return out
        for chunk in self._chunks(n_blocks, weight.device):
            packed[chunk] = encode(blocks[chunk].float().contiguous(), None if columns is None else columns(chunk))
        return out

    def encoder(self, effort: str) -> EncodeBlocks:
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


def _type(
    name: str,
    ggml_type: int,
    formats: ModuleType,
    *,
    fast: EncodeBlocks | None = None,
    best: EncodeBlocks | None = None,
    slower_in_c: tuple[Conversion, ...] = (),
) -> QuantType:
    """Return the type whose block and `dequantize_*` have its name in a module of `formats`."""
    return QuantType(
        name=name,
        ggml_type=ggml_type,
        block=getattr(formats, name),
        dequantize_blocks=getattr(formats, f"dequantize_{name.lower()}"),
        fast=fast,
        best=best,
        slower_in_c=slower_in_c,
    )


_BOTH: tuple[Conversion, ...] = ("dequantize", "quantize")
_TYPES = (
    _type("F32", 0, legacy, fast=legacy.encode_f32, best=legacy.encode_f32),
    _type("F16", 1, legacy, fast=legacy.encode_f16, best=legacy.encode_f16, slower_in_c=_BOTH),
    _type("BF16", 30, legacy, fast=legacy.encode_bf16, best=legacy.encode_bf16, slower_in_c=_BOTH),
    _type("Q4_0", 2, legacy, fast=legacy.encode_q4_0, best=search.best_q4_0),
    _type("Q4_1", 3, legacy, fast=legacy.encode_q4_1, best=search.best_q4_1),
    _type("Q5_0", 6, legacy, fast=legacy.encode_q5_0, best=search.best_q5_0),
    _type("Q5_1", 7, legacy, fast=legacy.encode_q5_1, best=search.best_q5_1),
    _type("Q8_0", 8, legacy, fast=legacy.encode_q8_0, best=search.best_q8_0),
    _type("Q2_K", 10, kquants, fast=ggml.encode_q2_k, best=search.best_q2_k),
    _type("Q3_K", 11, kquants, fast=ggml.encode_q3_k, best=search.best_q3_k),
    _type("Q4_K", 12, kquants, fast=ggml.encode_q4_k, best=search.best_q4_k),
    _type("Q5_K", 13, kquants, fast=ggml.encode_q5_k, best=search.best_q5_k),
    _type("Q6_K", 14, kquants, fast=ggml.encode_q6_k, best=search.best_q6_k),
    _type("IQ4_NL", 20, iq4, fast=ggml.encode_iq4_nl, best=search.best_iq4_nl),
    _type("IQ4_XS", 23, iq4, fast=ggml.encode_iq4_xs, best=search.best_iq4_xs, slower_in_c=("quantize",)),
    _type("IQ1_S", 19, iquants),
    _type("IQ1_M", 29, iquants),
    _type("IQ2_XXS", 16, iquants, slower_in_c=("dequantize",)),
    _type("IQ2_XS", 17, iquants, slower_in_c=("dequantize",)),
    _type("IQ2_S", 22, iquants, slower_in_c=("dequantize",)),
    _type("IQ3_XXS", 18, iquants, slower_in_c=("dequantize",)),
    _type("IQ3_S", 21, iquants, slower_in_c=("dequantize",)),
    _type("TQ1_0", 34, ternary, fast=ternary.encode_tq1_0),
    _type("TQ2_0", 35, ternary, fast=ternary.encode_tq2_0),
    _type("MXFP4", 39, microscaling, fast=microscaling.encode_mxfp4),
    _type("NVFP4", 40, microscaling),
)
QTYPES: dict[str, QuantType] = {qtype.name: qtype for qtype in _TYPES}
QTYPES_BY_ID: dict[int, QuantType] = {qtype.ggml_type: qtype for qtype in _TYPES}
