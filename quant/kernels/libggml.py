"""ggml's own C code for tensors in main memory, used where the package libggml-python is installed.

Source: ggml.h struct ggml_type_traits, ggml_get_type_traits, ggml_quantize_chunk @ ggml 0.20.2.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..qtype import QuantType

# Elements that a thread converts at a time. As float32 they stay in its cache until they are rounded.
_ELEMENTS = 1 << 18

# Weights at which d cannot overflow, and relative importance at which no search of ggml can fail.
_MAX_MAGNITUDE, _MIN_IMPORTANCE = 2.0**16, 1e-6

_RELEASE = "0.20"
"""The release that `_TypeTraits` describes. With another layout of the struct, a call would jump to a wrong address."""

CFunction = Callable[[int, int, int], None]
"""Takes the addresses of the source and the destination, and the number of elements."""
_CFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _TypeTraits(ctypes.Structure):
    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", _CFunction),
        ("from_float_ref", _CFunction),
    )


def _load() -> ctypes.CDLL:
    spec = find_spec("libggml")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("libggml-python is not installed")
    installed = version("libggml-python")
    if not installed.startswith(f"{_RELEASE}."):
        raise ImportError(f"libggml-python {installed} is installed, expected {_RELEASE}.*")
    folder = Path(spec.submodule_search_locations[0])
    path = next((p for p in sorted(folder.rglob("*ggml-base.*")) if p.suffix in (".so", ".dylib", ".dll")), None)
    if path is None:
        raise ImportError(f"{folder} has no ggml-base library")
    library = ctypes.CDLL(str(path))
    library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = (ctypes.c_int, pointer, pointer, number, number, number, pointer)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


_library = _load()


def type_traits(qtype: QuantType) -> _TypeTraits:
    """Return the library's description of a type: its sizes and its functions."""
    traits: _TypeTraits = _library.ggml_get_type_traits(qtype.ggml_type).contents
    return traits


def _same_sizes(qtype: QuantType) -> bool:
    traits = type_traits(qtype)
    return (traits.blck_size, traits.type_size) == (qtype.block_size, qtype.type_size)


def _same_bits(qtype: QuantType) -> bool:
    """Return whether this build dequantizes to ggml's reference bits; a compiler may have fused its arithmetic."""
    traits = type_traits(qtype)
    if not _same_sizes(qtype) or not traits.to_float:
        return False
    packed = torch.arange(64 * qtype.type_size).mul_(37).to(torch.uint8).view(64, -1)  # every byte in every field
    weights = torch.empty(64, qtype.block_size)
    traits.to_float(packed.data_ptr(), weights.data_ptr(), weights.numel())
    same: Tensor = weights.view(torch.int32) == qtype.dequantize_blocks(packed).view(torch.int32)
    return bool((same | weights.isnan()).all())


def _same_codes(qtype: QuantType) -> bool:
    """Return whether this build encodes as `fast` does, for values of all exponents whose cubes float32 can hold."""
    traits = type_traits(qtype)
    if not _same_sizes(qtype) or not traits.from_float_ref or qtype.fast is None:
        return False
    steps = torch.arange(376 * qtype.block_size).view(376, -1)
    weights = torch.ldexp(torch.sin(steps.float()), torch.arange(376)[:, None] % 188 - 148)
    packed = torch.empty(len(weights), qtype.type_size, dtype=torch.uint8)
    traits.from_float_ref(weights.data_ptr(), packed.data_ptr(), weights.numel())
    return torch.equal(packed, qtype.fast(weights, None))


@cache
def _dequantizer(qtype: QuantType) -> CFunction | None:
    """Return ggml's function if it is faster and gives the same bits, which is checked once per type."""
    usable = "dequantize" not in qtype.slower_in_c and _same_bits(qtype)
    return type_traits(qtype).to_float if usable else None


@cache
def _quantizer(qtype: QuantType) -> CFunction | None:
    usable = "quantize" not in qtype.slower_in_c and _same_codes(qtype)
    return type_traits(qtype).from_float_ref if usable else None


def quantize(qtype: QuantType, blocks: Tensor, packed: Tensor) -> bool:
    """Quantize as `QuantType.fast` does, if ggml's C code gives the same bytes and is faster.

    Args:
        blocks: (n, block_size) of any float dtype.
        packed: uint8 (n, type_size), contiguous; written to.

    Returns:
        Whether that was done.
    """
    convert = _quantizer(qtype)
    if convert is None:
        return False
    if blocks.dtype is torch.float32 and blocks.is_contiguous():
        _run(convert, blocks, packed, qtype.block_size)
        return True
    step = torch.get_num_threads() * _ELEMENTS // qtype.block_size
    for source, destination in zip(torch.split(blocks, step), torch.split(packed, step), strict=True):
        _run(convert, source.float().contiguous(), destination, qtype.block_size)
    return True


def quantize_rows(qtype: QuantType, rows: Tensor, packed: Tensor, importance: Tensor | None) -> bool:
    """Quantize rows as ggml does with importance.

    ggml ends the process where a weight is NaN or infinite, or all weights that are quantized together have no
    importance. Such weights are therefore replaced by finite ones, and importance has a floor far below its mean.

    Args:
        rows: float32 (rows, n), contiguous.
        packed: uint8 (rows, bytes per row), contiguous; written to.
        importance: float32 (n,), or None.

    Returns:
        Whether that was done.
    """
    if not _same_sizes(qtype):
        return False
    rows = rows.nan_to_num(0.0).clamp_(-_MAX_MAGNITUDE, _MAX_MAGNITUDE)
    weights = torch.ones(rows.shape[1]) if importance is None else importance / importance.mean().clamp(min=1e-30)
    weights = weights.clamp_(min=_MIN_IMPORTANCE)
    address = None if importance is None else weights.data_ptr()

    def convert(source: int, destination: int, n_elements: int) -> None:
        _library.ggml_quantize_chunk(
            qtype.ggml_type, source, destination, 0, n_elements // rows.shape[1], rows.shape[1], address
        )

    if rows.numel():
        _run(convert, rows, packed, rows.shape[1])
    return True


def dequantize(qtype: QuantType, packed: Tensor, out: Tensor) -> bool:
    """Dequantize, if ggml's C code gives the same bits and is faster.

    Args:
        packed: uint8, n * type_size elements, contiguous.
        out: any float dtype, n * block_size elements, contiguous; written to.

    Returns:
        Whether that was done.
    """
    convert = _dequantizer(qtype)
    if convert is None:
        return False
    blocks, weights = packed.view(-1, qtype.type_size), out.view(-1, qtype.block_size)
    if out.dtype is torch.float32:
        _run(convert, blocks, weights, qtype.block_size)
        return True
    step = torch.get_num_threads() * _ELEMENTS // qtype.block_size
    scratch = torch.empty(min(step, len(blocks)), qtype.block_size)
    for source, destination in zip(torch.split(blocks, step), torch.split(weights, step), strict=True):
        _run(convert, source, scratch[: len(source)], qtype.block_size)
        destination.copy_(scratch[: len(source)])
    return True


def _run(convert: CFunction, source: Tensor, out: Tensor, block_size: int) -> None:
    """Convert blocks on as many threads as torch uses; ctypes releases the GIL during a call."""
    threads = torch.get_num_threads()
    if threads == 1:
        convert(source.data_ptr(), out.data_ptr(), len(source) * block_size)
        return
    parts = zip(torch.tensor_split(source, threads), torch.tensor_split(out, threads), strict=True)
    calls = [(part.data_ptr(), to.data_ptr(), len(part) * block_size) for part, to in parts]
    list(_pool(threads).map(lambda call: convert(*call), calls))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "wanquant-ggml")
