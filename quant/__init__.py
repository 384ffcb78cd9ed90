"""GGUF block formats and conversion. Imports torch, numpy, safetensors and gguf; never comfy."""

from __future__ import annotations

from .calibration_file import read_calibration, write_calibration
from .convert import ConversionReport, convert
from .errors import QuantError
from .gguf_file import open_gguf
from .importance_file import read_importance, write_importance
from .kernels import op as op  # registers torch.ops.wanquant.dequantize
from .qtype import QTYPES, QuantType

__all__ = [
    "QTYPES",
    "ConversionReport",
    "QuantError",
    "QuantType",
    "convert",
    "open_gguf",
    "read_calibration",
    "read_importance",
    "write_calibration",
    "write_importance",
]
