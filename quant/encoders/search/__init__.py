"""Encoders that minimize the squared error, weighted by importance where given, under ggml's block formats.

Every encoder takes blocks, float32 (n, block_size), and importance of the same shape or None, on any device. It returns
uint8 (n, type_size). `encode_with_feedback` takes any of them, and minimizes the error of a layer's outputs instead.
"""

from __future__ import annotations

from .encoders import Encoder
from .feedback import encode_with_feedback

__all__ = ["Encoder", "encode_with_feedback"]
