"""GGUF block formats and conversion, independent of ComfyUI; needs torch, numpy, safetensors and gguf."""

from __future__ import annotations

from . import torch_op as torch_op  # registers torch.ops.wanquant.dequantize
from .conversion.convert import ConversionReport, convert
from .errors import QuantError
from .gguf.reader import open_gguf
from .qtype import QTYPES, QuantType
from .statistics.calibration_file import read_calibration, write_calibration
from .statistics.importance_file import read_importance, write_importance

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
