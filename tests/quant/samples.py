"""Input data for the quantization tests: packed bytes, weights that are hard to quantize, and inputs of layers."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wanquant.quant.qtype import QuantType
from wanquant.quant.statistics.calibration import Calibration, CalibrationCollector

F16_FIELDS = {
    "F16": (0,),
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS", "Q1_0", "Q2_0"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    **dict.fromkeys(("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (0,)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}
"""Byte offsets of the float16 factors of a block."""

_SUBNORMAL = 2.0**-24
SPECIAL_SCALES = (0.0, -0.0, 1.0, -1.0, _SUBNORMAL, -_SUBNORMAL, 1023 * _SUBNORMAL, 65504, np.inf, -np.inf, np.nan)


def random_blocks(qtype: QuantType, n_blocks: int, seed: int = 0) -> Tensor:
    """Return random bytes, uint8 (n_blocks, type_size); in about one block of 30, a scale is NaN or infinite."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (n_blocks, qtype.type_size), dtype=np.uint8))


def special_blocks(qtype: QuantType) -> Tensor:
    """Return random blocks with every combination of SPECIAL_SCALES as their float16 factors, uint8 (n, type_size)."""
    scales = np.array(SPECIAL_SCALES, np.float16).view(np.uint8).reshape(-1, 2)
    fields = F16_FIELDS.get(qtype.name, ())
    blocks = random_blocks(qtype, len(scales) ** max(1, len(fields))).numpy()
    for field, offset in enumerate(fields):
        blocks[:, offset : offset + 2] = scales[np.arange(len(blocks)) // len(scales) ** field % len(scales)]
    return torch.from_numpy(blocks)


def weights(kind: str, block_size: int) -> NDArray[np.float32]:
    """Return weights of a kind, float32 (64, 4 * block_size)."""
    rng = np.random.default_rng(1)
    shape = (64, 4 * block_size)
    gaussian = rng.standard_normal(shape, np.float32)
    zeros = np.zeros(shape, np.float32)
    match kind:
        case "gaussian":
            return gaussian * np.float32(0.02)
        case "student_t5":
            return rng.standard_t(5, shape).astype(np.float32)
        case "zeros":
            return zeros
        case "negative_zeros":
            return np.where(gaussian < 0, -zeros, zeros).astype(np.float32)
        case "constant":
            return zeros + gaussian[:, :1]
        case "positive":
            return np.abs(gaussian)
        case "ties":  # the largest magnitude occurs with both signs
            return np.sign(gaussian)
        case "halves":  # codes fall halfway between integers
            return rng.integers(-254, 255, shape).astype(np.float32) / 2
        case "one":
            zeros[np.arange(64), rng.integers(0, shape[1], 64)] = 1
            return zeros
        case "huge":  # scales overflow float16
            return gaussian * np.float32(1e8)
        case "tiny":  # scales underflow float16
            return gaussian * np.float32(1e-8)
        case "subnormal":  # the inverse of a scale overflows float32
            return gaussian * np.float32(1e-40)
    raise ValueError(kind)


WEIGHTS = (
    *("gaussian", "student_t5", "zeros", "negative_zeros", "constant", "positive"),
    *("ties", "halves", "one", "huge", "tiny", "subnormal"),
)


def correlated(columns: int, *, rows: int = 2048, seed: int = 0) -> Tensor:
    """Return inputs like those inside a network, float32 (rows, columns).

    A few directions explain most of them, and the columns differ in size.
    """
    model, draw = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    directions = torch.randn(32, columns, generator=model) * (-torch.arange(32) / 10).exp()[:, None]
    scales = (0.7 * torch.randn(columns, generator=model)).exp()
    explained = torch.randn(rows, 32, generator=draw) @ directions
    return (explained / explained.std() + 0.5 * torch.randn(rows, columns, generator=draw)) * scales


def collected(**inputs: Tensor) -> Calibration:
    """Return the calibration of layers with these inputs, float32 (rows, columns)."""
    collector = CalibrationCollector()
    for name, values in inputs.items():
        collector.add(name, values)
    collector.samples = 1
    return collector.result()


def assert_same_bits(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    """Assert that two arrays are equal bit by bit, except that any NaN equals any other."""
    assert actual.dtype == expected.dtype == np.float32
    assert actual.shape == expected.shape
    assert actual.size
    differ = (actual.view(np.uint32) != expected.view(np.uint32)) & ~(np.isnan(actual) & np.isnan(expected))
    where = tuple(index[0] for index in np.nonzero(differ)) if differ.any() else ()
    assert not differ.any(), (
        f"{differ.sum()} of {differ.size} differ, first {where}: {actual[where]} != {expected[where]}"
    )
