"""Oracles of the native formats: what comfy-kitchen encodes, and what it decodes from our tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch
from torch import Tensor

from wanquant.testing import kitchen

Parts = Mapping[str, Tensor]


def layout(name: str):
    """Return a layout of kitchen's, or skip the test where the installed one lacks it."""
    try:
        return kitchen.layout(name)
    except kitchen.MissingLayoutError as error:
        pytest.skip(str(error))


def dequantize(name: str, weight: Tensor, shape: tuple[int, ...], **params: object) -> Tensor:
    cls = layout(name)
    values = cls.dequantize(weight, cls.Params(orig_dtype=torch.float32, orig_shape=shape, **params))
    return values[: shape[0], : shape[1]]


def _fp8(parts: Parts, shape: tuple[int, ...]) -> Tensor:
    return dequantize("TensorCoreFP8Layout", parts["weight"], shape, scale=parts["weight_scale"])


def _mxfp8(parts: Parts, shape: tuple[int, ...]) -> Tensor:
    scale = parts["weight_scale"].view(torch.float8_e8m0fnu)
    return dequantize("TensorCoreMXFP8Layout", parts["weight"], shape, scale=scale)


def _nvfp4(parts: Parts, shape: tuple[int, ...]) -> Tensor:
    scales = {"scale": parts["weight_scale_2"], "block_scale": parts["weight_scale"]}
    return dequantize("TensorCoreNVFP4Layout", parts["weight"], shape, **scales)


def _int8(parts: Parts, shape: tuple[int, ...]) -> Tensor:
    rotation = {"convrot": True, "convrot_groupsize": 256}
    return dequantize("TensorWiseINT8Layout", parts["weight"], shape, scale=parts["weight_scale"], **rotation)


def _int4(parts: Parts, shape: tuple[int, ...]) -> Tensor:
    name, scale = "TensorCoreConvRotW4A4Layout", parts["weight_scale"]
    return dequantize(name, parts["weight"], shape, scale=scale, convrot_groupsize=256)


def _levels(parts: Parts, shape: tuple[int, ...], group: int = 16) -> Tensor:
    scales = {"scale": parts["weight_s_rel"], "s_channel": parts["weight_s_channel"]}
    others = {"codebook": parts.get("weight_codebook"), "group_size": group, "convrot_groupsize": 256}
    try:
        return dequantize("AsymW4A8Int8Layout", parts["weight"], shape, **scales, **others)
    except ValueError as error:
        if "weight_codebook" in parts:
            raise
        pytest.skip(f"this comfy-kitchen has no 6 bits: {error}")


DECODE: dict[str, Callable[[Parts, tuple[int, ...]], Tensor]] = {
    "FP8": _fp8,
    "MXFP8": _mxfp8,
    "NVFP4": _nvfp4,
    "INT8": _int8,
    "INT4": _int4,
    "W4A8": _levels,
    "W4A8_G32": partial(_levels, group=32),
    "W6A8": _levels,
}


def kitchen_values(name: str, weight: Tensor) -> Tensor:
    """Return what kitchen makes of a weight, float32 (rows, columns), or skip the test where it lacks the format."""
    try:
        return kitchen.kitchen_values(name, weight)
    except kitchen.MissingLayoutError as error:
        pytest.skip(str(error))
