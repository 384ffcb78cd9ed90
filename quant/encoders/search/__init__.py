"""Encoders that minimise the squared error, weighted by importance where given, under ggml's block formats.

Every encoder takes blocks (n, block_size) float32 and importance of the same shape or None, on any device, and returns
(n, type_size) uint8. `encode_with_feedback` takes any of them, and minimises the error of a layer's outputs for
correlated inputs.
"""

from __future__ import annotations

from .encoders import (
    Encoder,
    best_iq4_nl,
    best_iq4_xs,
    best_q2_k,
    best_q3_k,
    best_q4_0,
    best_q4_1,
    best_q4_k,
    best_q5_0,
    best_q5_1,
    best_q5_k,
    best_q6_k,
    best_q8_0,
)
from .feedback import encode_with_feedback

__all__ = [
    "Encoder",
    "best_iq4_nl",
    "best_iq4_xs",
    "best_q2_k",
    "best_q3_k",
    "best_q4_0",
    "best_q4_1",
    "best_q4_k",
    "best_q5_0",
    "best_q5_1",
    "best_q5_k",
    "best_q6_k",
    "best_q8_0",
    "encode_with_feedback",
]
