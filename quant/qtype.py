"""QuantType, a ggml tensor type, and QTYPES, all of them by ggml's names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass, field
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from .device import elements_at_a_time
from .encoders import ggml
from .encoders.search import encoders as search
from .encoders.search import grid_types as grid_search
from .errors import QuantError
from .formats import iq4, iquants, kquants, legacy, low_bits, microscaling, plain, ternary
from .formats.bits import Affine, BlockLayout
from .kernels.optional import GGML

Effort = Literal["fast", "best", "thorough"]
_EFFORTS: tuple[Effort, ...] = get_args(Effort)
Conversion = Literal["dequantize", "quantize"]
InC = Literal["requires importance", "uses importance"]
UnpackBlocks = Callable[[Tensor], Affine]
"""Takes uint8 (n, type_size)."""
EncodeBlocks = Callable[[Tensor, "Tensor | None"], Tensor]
"""Takes float32 (n, block_size) and importance of the same shape or None, returns uint8 (n, type_size)."""


@dataclass(frozen=True)
class QuantType:
    """A ggml tensor type, which stores every `block_size` elements in `type_size` bytes."""

    _: KW_ONLY
    name: str
    ggml_type: int
    """The number of the type in GGUF files. Source: ggml.h enum ggml_type."""
    block: BlockLayout
    unpack: UnpackBlocks = field(repr=False, compare=False)
    fast: EncodeBlocks | None = field(default=None, repr=False, compare=False)
    """The encoder that writes ggml's own bytes."""
    best: EncodeBlocks | None = field(default=None, repr=False, compare=False)
    """The encoder that searches for the least squared error."""
    slower_in_c: tuple[Conversion, ...] = field(default=(), repr=False)
    """The conversions for which ggml's C code is slower than the torch operations."""
    revision: int = field(default=0, repr=False)
    """Counts how often the bytes that `fast` or `best` write have changed since version 0.1.0."""
    fast_in_c: InC | None = field(default=None, repr=False)
    """Set where ggml's C code alone writes ggml's bytes: whether it requires importance, or can use it."""

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
        """The efforts that `quantize` has an encoder for; none for a type that can only be read."""
        return tuple(e for e in _EFFORTS if self._encoder(e) or (e == "fast" and self.fast_in_c))

    def packed_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape in bytes of a tensor of this shape; only the last axis changes.

        Raises:
            QuantError: the last axis is not a multiple of the block size.
        """
        if not shape or shape[-1] % self.block_size:
            raise QuantError(
                f"shape {shape}: the last axis is not a multiple of the {self.name} block size {self.block_size};"
                " choose a type with smaller blocks"
            )
        return (*shape[:-1], shape[-1] // self.block_size * self.type_size)

    def unpacked_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the tensor that is stored in bytes of this shape, the inverse of `packed_shape`.

        Raises:
            QuantError: the last axis is not a multiple of the type size.
        """
        if not shape or shape[-1] % self.type_size:
            raise QuantError(
                f"shape {shape} in bytes: the last axis is not a multiple of the {self.name} type size"
                f" {self.type_size}; the data is cut off or of another type, get the file again"
            )
        return (*shape[:-1], shape[-1] // self.type_size * self.block_size)

    def dequantize_blocks(self, blocks: Tensor) -> Tensor:
        """Dequantize with torch operations: uint8 (n, type_size) -> float32 (n, block_size)."""
        return self.unpack(blocks).weights()

    def dequantize(self, packed: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dequantize in float32 arithmetic and round once to `dtype`.

        Args:
            packed: uint8, (..., n_blocks * type_size), on any device.

        Returns:
            A new tensor of `dtype`, (..., n_blocks * block_size), on the same device.

        Raises:
            QuantError: `packed` is not uint8, or its last axis is not a multiple of the type size.
        """
        if packed.dtype != torch.uint8:
            raise QuantError(f"{self.name}: packed data is {packed.dtype}, expected torch.uint8; view it as bytes")
        self.unpacked_shape(tuple(packed.shape))
        # The operator is called by name because its module, quant/torch_op.py, imports this one.
        weight: Tensor = torch.ops.wanquant.dequantize(packed, self.name, dtype)
        return weight

    def quantize(self, weight: Tensor, importance: Tensor | None = None, effort: Effort = "best") -> Tensor:
        """Quantize a weight.

        Args:
            weight: any float dtype, (..., n), where n is a multiple of `block_size`.
            importance: any float dtype, (n,). The importance of each input channel in the squared error, at least 0.
            effort: "best" minimizes the squared error. "fast" writes the bytes that ggml writes without importance.
                With importance, both minimize the weighted squared error; types without such an encoder ignore it.
                "thorough" is the same as "best" here: it differs for a layer whose inputs are known.
                For IQ1 to IQ3, "fast" is ggml's own encoder with the importance.

        Returns:
            uint8, (..., n_blocks * type_size), on the weight's device.

        Raises:
            QuantError: the type has no encoder for `effort`, n is not a multiple of the block size, the importance
                is not one for this weight, or is missing where the encoder requires it.
        """
        if effort == "fast" and self.fast_in_c:
            return self._quantize_in_c(weight, importance)
        encode = self.encoder(effort)
        if importance is not None and self.best:
            encode = self.best
        self._check_weight(weight)
        out = torch.empty(self.packed_shape(tuple(weight.shape)), dtype=torch.uint8, device=weight.device)
        n_blocks = weight.numel() // self.block_size
        blocks, packed = weight.reshape(n_blocks, self.block_size), out.view(n_blocks, self.type_size)
        of_chunk = None if importance is None else self._importance_of_chunks(importance, weight)
        if encode is self.fast and weight.device.type == "cpu" and GGML.quantize(self, blocks, packed):
            return out
        for chunk in self._chunks(n_blocks, weight.device):
            packed[chunk] = encode(blocks[chunk].float().contiguous(), None if of_chunk is None else of_chunk(chunk))
        return out

    def _quantize_in_c(self, weight: Tensor, importance: Tensor | None) -> Tensor:
        """Write ggml's bytes by ggml's C code, which runs on the CPU."""
        if importance is None and self.fast_in_c == "requires importance":
            raise QuantError(
                f"{self.name}: effort fast got no importance, which ggml's encoder of this type requires;"
                " give an importance matrix, or choose effort best"
            )
        self._check_weight(weight)
        row = None if importance is None else self._importance_of_row(importance, weight)
        rows = weight.detach().to("cpu", torch.float32).reshape(-1, weight.shape[-1]).contiguous()
        packed = torch.empty(self.packed_shape(tuple(rows.shape)), dtype=torch.uint8)
        if not GGML.quantize_rows(self, rows, packed, None if row is None else row.cpu()):
            raise QuantError(
                f"{self.name}: effort fast is ggml's C code, which cannot be used here; install libggml-python 0.20,"
                " or choose effort best"
            )
        return packed.view(self.packed_shape(tuple(weight.shape))).to(weight.device)

    def encoder(self, effort: str) -> EncodeBlocks:
        """Return the encoder of an effort.

        Raises:
            QuantError: there is no such effort, or this type has no encoder for it.
        """
        if effort not in _EFFORTS:
            raise QuantError(f"{self.name}: effort {effort!r} is unknown; choose from {', '.join(_EFFORTS)}")
        encode = self._encoder(effort)
        if encode is None:
            writable = ", ".join(qtype.name for qtype in QTYPES.values() if effort in qtype.efforts)
            raise QuantError(f"{self.name}: this type has no {effort} encoder; choose from {writable}")
        return encode

    def _encoder(self, effort: str) -> EncodeBlocks | None:
        return self.fast if effort == "fast" else self.best

    def _check_weight(self, weight: Tensor) -> None:
        if not weight.is_floating_point():
            raise QuantError(f"{self.name}: weight is {weight.dtype}, expected floating point; convert it first")

    def _importance_of_chunks(self, importance: Tensor, weight: Tensor) -> Callable[[slice], Tensor]:
        """Return a function from a chunk of n blocks to its importance, float32 (n, block_size)."""
        # The importance repeats with every row of the weight.
        row = self._importance_of_row(importance, weight).view(-1, self.block_size)
        return lambda chunk: row[torch.arange(chunk.start, chunk.stop, device=row.device) % len(row)]

    def _importance_of_row(self, importance: Tensor, weight: Tensor) -> Tensor:
        """Check the importance, and return it on the weight's device, float32 (n,)."""
        if importance.shape != weight.shape[-1:]:
            raise QuantError(
                f"{self.name}: importance of shape {tuple(importance.shape)}, expected {tuple(weight.shape[-1:])},"
                " one value per input channel; choose the importance of this tensor"
            )
        if not importance.is_floating_point() or bool((importance < 0).any()):
            raise QuantError(
                f"{self.name}: importance is {importance.dtype} or has values below 0, expected floating point and"
                " at least 0; use means of squared inputs"
            )
        return importance.to(weight.device, torch.float32)

    def _chunks(self, n_blocks: int, device: torch.device) -> Iterator[slice]:
        step = max(1, elements_at_a_time(device) // self.block_size)
        for start in range(0, n_blocks, step):
            yield slice(start, min(start + step, n_blocks))


def qtype_of(ggml_type: int) -> QuantType:
    """Return the type that has this number in GGUF files.

    Raises:
        QuantError: no known type has it.
    """
    if ggml_type not in QTYPES_BY_ID:
        known = ", ".join(f"{number} {qtype.name}" for number, qtype in sorted(QTYPES_BY_ID.items()))
        raise QuantError(
            f"ggml type {ggml_type} is unknown, expected one of {known}; update WanQuant, which may read the file then"
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
    fast_in_c: InC | None = None,
) -> QuantType:
    """Return the type whose block layout and `unpack_*` have its name in a module of `formats`."""
    return QuantType(
        name=name,
        ggml_type=ggml_type,
        block=getattr(formats, name),
        unpack=getattr(formats, f"unpack_{name.lower()}"),
        fast=fast,
        best=best,
        slower_in_c=slower_in_c,
        fast_in_c=fast_in_c,
    )


_BOTH: tuple[Conversion, ...] = ("dequantize", "quantize")
_REQUIRES: InC = "requires importance"
_USES: InC = "uses importance"
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
    _type("IQ1_S", 19, iquants, best=grid_search.best_iq1_s, fast_in_c=_REQUIRES),
    _type("IQ1_M", 29, iquants, best=grid_search.best_iq1_m, fast_in_c=_REQUIRES),
    _type("IQ2_XXS", 16, iquants, best=grid_search.best_iq2_xxs, fast_in_c=_REQUIRES, slower_in_c=("dequantize",)),
    _type("IQ2_XS", 17, iquants, best=grid_search.best_iq2_xs, fast_in_c=_REQUIRES, slower_in_c=("dequantize",)),
    _type("IQ2_S", 22, iquants, best=grid_search.best_iq2_s, fast_in_c=_USES, slower_in_c=("dequantize",)),
    _type("IQ3_XXS", 18, iquants, best=grid_search.best_iq3_xxs, fast_in_c=_USES, slower_in_c=("dequantize",)),
    _type("IQ3_S", 21, iquants, best=grid_search.best_iq3_s, fast_in_c=_USES, slower_in_c=("dequantize",)),
    _type("TQ1_0", 34, ternary, fast=ternary.encode_tq1_0),
    _type("TQ2_0", 35, ternary, fast=ternary.encode_tq2_0),
    _type("MXFP4", 39, microscaling, fast=microscaling.encode_mxfp4),
    _type("NVFP4", 40, microscaling),
    _type("Q1_0", 41, low_bits, slower_in_c=("dequantize",)),
    _type("Q2_0", 42, low_bits, slower_in_c=("dequantize",)),
    _type("I8", 24, plain, slower_in_c=_BOTH),
    _type("I16", 25, plain, slower_in_c=_BOTH),
    _type("I32", 26, plain, slower_in_c=_BOTH),
    _type("I64", 27, plain, slower_in_c=_BOTH),
    _type("F64", 28, plain, slower_in_c=_BOTH),
)
QTYPES: dict[str, QuantType] = {qtype.name: qtype for qtype in _TYPES}
QTYPES_BY_ID: dict[int, QuantType] = {qtype.ggml_type: qtype for qtype in _TYPES}
