"""Quantized layers of sizes, dtypes and options that no real file has are refused when the file is opened."""

from __future__ import annotations

import json
import os
from math import prod

import pytest

from wanquant.quant import QuantError
from wanquant.quant.sources.checkpoint import open_checkpoint

LAYER = "blocks.0.ffn.0"
BYTES = {"F32": 4, "F16": 2}


def write(path, tensors, sparse=0):
    """Write tensors that are given as (dtype, shape, bytes or None for zeros); the last one has `sparse` zeros more."""
    header, data = {"head.modulation": {"dtype": "F32", "shape": [1, 2, 2], "data_offsets": [0, 16]}}, bytes(16)
    for name, (dtype, shape, content) in tensors.items():
        content = bytes(prod(shape) * BYTES.get(dtype, 1)) if content is None else content
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    if sparse:
        header[name]["data_offsets"][1] += sparse
        header[name]["shape"] = [sparse]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    os.truncate(path, path.stat().st_size + sparse)
    return path


def marked(kind, weight, options=None, **parts):
    marker = json.dumps({"format": kind, **(options or {})}).encode()
    tensors = {"weight": (*weight, None), "comfy_quant": ("U8", (len(marker),), marker)}
    return {f"{LAYER}.{name}": value for name, value in (tensors | parts).items()}


ONE = ("F32", (1,), None)
NVFP4 = {"kind": "nvfp4", "weight": ("U8", (32, 16)), "weight_scale": ("F8_E4M3", (128, 4), None)}
DAMAGED = {
    "int8 without rows": (marked("int8_tensorwise", ("I8", (0, 32)), weight_scale=ONE), "no size of 0"),
    "fp8 without columns": (marked("float8_e4m3fn", ("F8_E4M3", (32, 0)), weight_scale=ONE), "no size of 0"),
    "fp8 scalar": (marked("float8_e4m3fn", ("F8_E4M3", ()), weight_scale=ONE), "expected at least 1 dimension"),
    "no groups": (
        marked(
            *("asym_w4a8_int8", ("I8", (32, 16))),
            weight_s_rel=("F32", (32, 0), None),
            weight_s_channel=("F32", (32,), None),
        ),
        r"weight_s_rel has shape \(32, 0\), expected .* no size of 0",
    ),
    "no scale": (marked("float8_e4m3fn", ("F8_E4M3", (32, 32)), weight_scale=("F32", (0,), None)), "no size of 0"),
    "integer scale": (
        marked(**NVFP4, weight_scale_2=("I8", (1,), None)),
        "weight_scale_2 is I8 .* expected one number",
    ),
    "two scales": (marked(**NVFP4, weight_scale_2=("F32", (2,), None)), r"is F32 of shape \(2,\), expected one number"),
    "block scales of F32": (
        marked(**{**NVFP4, "weight_scale": ("F32", (128, 1), None)}, weight_scale_2=ONE),
        "512 bytes of block scales of F32, expected 512 of F8_E4M3 or U8",
    ),
    "rotation": (
        marked(
            *("int8_tensorwise", ("I8", (1, 16384)), {"convrot": True, "convrot_groupsize": 16384}), weight_scale=ONE
        ),
        "convrot_groupsize is 16384, expected a power of 4 .* up to 4096",
    ),
    "digits": (
        {f"{LAYER}.weight": ("I8", (1, 1), None), f"{LAYER}.comfy_quant": ("U8", (5000,), b"9" * 5000)},
        "an integer of 5000 digits",
    ),
    "pairs": (
        {f"{LAYER}.weight": ("I8", (1, 1), None), f"{LAYER}.comfy_quant": ("U8", (13,), b'[[["a"],"b"]]')},
        "expected a JSON object with a format",
    ),
    "empty bias": (
        {"patch_embedding.bias": ("F32", (0,), None), "patch_embedding.weight": ("F32", (8, 4), None)},
        "patch_embedding.bias: shape .* has a dimension of size 0",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_layers(tmp_path, kind):
    tensors, message = DAMAGED[kind]
    with pytest.raises(QuantError, match=message):
        open_checkpoint(write(tmp_path / "a.safetensors", tensors))


@pytest.mark.parametrize("name", [f"{LAYER}.comfy_quant", f"{LAYER}.comfy_attention.config"])
def test_a_text_of_gigabytes_is_not_read(tmp_path, name):
    tensors = {f"{LAYER}.weight": ("I8", (1, 1), None), name: ("U8", (0,), b"")}
    with pytest.raises(QuantError, match=r"expected the .* that ComfyUI writes in 1 to 65536 bytes of U8"):
        open_checkpoint(write(tmp_path / "a.safetensors", tensors, sparse=12 << 30))
