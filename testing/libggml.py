"""libggml, llama.cpp's own C library (PyPI: libggml-python), as the reference of the quantization tests."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray


class _TypeTraits(ctypes.Structure):
    """The struct ggml_type_traits of ggml.h."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    ]


# The package gguf 0.19 does not have the last type yet.
NUMBERS = {**{qtype.name: qtype.value for qtype in GGMLQuantizationType}, "Q2_0": 42}

_ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class LibGGML:
    """A binding to ggml's quantization; types are named as in `gguf.GGMLQuantizationType`."""

    def __init__(self, path: Path) -> None:
        self._lib = ctypes.CDLL(str(path))
        self._lib.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
        self._lib.ggml_quantize_chunk.restype = ctypes.c_size_t
        self._lib.ggml_quantize_chunk.argtypes = [
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
            *[ctypes.c_int64] * 3,
            ctypes.c_void_p,
        ]

    def sizes(self, name: str) -> tuple[int, int]:
        """Return the block size in elements and in bytes, as compiled into the library."""
        traits = self._lib.ggml_get_type_traits(NUMBERS[name]).contents
        return traits.blck_size, traits.type_size

    def dequantize(self, name: str, packed: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Dequantize `packed`: uint8, (..., bytes per row).

        Returns:
            float32, (..., elements per row).
        """
        block_size, type_size = self.sizes(name)
        packed = np.ascontiguousarray(packed)
        out = np.full((*packed.shape[:-1], packed.shape[-1] // type_size * block_size), np.nan, np.float32)
        if name == "F32":  # the only type without a to_float
            plain: NDArray[np.float32] = packed.view(np.float32).copy()
            return plain
        to_float = self._lib.ggml_get_type_traits(NUMBERS[name]).contents.to_float
        _ToFloat(to_float)(packed.ctypes.data, out.ctypes.data, out.size)
        return out

    def quantize(
        self, name: str, weight: NDArray[np.float32], importance: NDArray[np.float32] | None = None
    ) -> NDArray[np.uint8]:
        """Quantize a weight.

        Args:
            weight: float32, (..., columns).
            importance: ggml's imatrix, float32, (columns,).

        Returns:
            uint8, (..., bytes per row).
        """
        block_size, type_size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
        weight = np.ascontiguousarray(weight, np.float32)
        columns = weight.shape[-1]
        if columns % block_size:
            raise ValueError(
                f"{name}: {columns} columns, expected a multiple of {block_size}: libggml would abort the process"
            )
        out = np.zeros((*weight.shape[:-1], columns // block_size * type_size), np.uint8)
        if importance is not None:
            importance = np.ascontiguousarray(importance, np.float32)
            if importance.shape != (columns,):
                raise ValueError(
                    f"{name}: importance of shape {importance.shape}, expected {(columns,)}: libggml would read past it"
                )
        written = self._lib.ggml_quantize_chunk(
            NUMBERS[name],
            weight.ctypes.data,
            out.ctypes.data,
            0,
            weight.size // columns,
            columns,
            None if importance is None else importance.ctypes.data,
        )
        if written != out.nbytes:
            raise RuntimeError(f"libggml wrote {written} bytes of {name}, expected {out.nbytes}")
        return out


def load() -> LibGGML:
    """Return the installed library; without it the tests fail, because it is their reference."""
    spec = importlib.util.find_spec("libggml")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("libggml-python is not installed: run `python3 dev.py setup`")
    return LibGGML(Path(spec.origin).parent / "lib64" / "libggml-base.so")
