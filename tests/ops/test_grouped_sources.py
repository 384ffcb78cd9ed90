"""Weights in groups of 4 and 6 bits: our values equal those of comfy-kitchen, where it has the formats."""

from __future__ import annotations

import json

import comfy_kitchen.tensor as kitchen
import pytest
import torch
from safetensors.torch import save_file

from wanquant.quant import QuantError
from wanquant.quant.sources.checkpoint import open_checkpoint

LAYER = "blocks.0.ffn.0"
AWQ = getattr(kitchen, "TensorCoreAWQW4A16Layout", None)
LEVELS = getattr(kitchen, "AsymW4A8Int8Layout", None)
ROWS, COLUMNS = 24, 512


def stored(tensors, config, **others):
    marker = torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)
    parts = {f"{LAYER}.weight{suffix}": value.contiguous() for suffix, value in tensors.items()}
    return parts | {"head.modulation": torch.zeros(1, 2, 8), f"{LAYER}.comfy_quant": marker} | others


def check(path, expected, tensors):
    save_file(tensors, path)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tensors.keys() == {"head.modulation", f"{LAYER}.weight"}
        tensor = checkpoint.tensors[f"{LAYER}.weight"]
        assert tensor.shape == expected.shape
        torch.testing.assert_close(tensor.read().view(expected.shape), expected, rtol=1e-6, atol=1e-6)
        middle = tensor.read(COLUMNS + 5, 3 * COLUMNS + 7)
        torch.testing.assert_close(middle, expected.flatten()[COLUMNS + 5 : 3 * COLUMNS + 7], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("group", [None, 32, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_awq(tmp_path, group, dtype):
    generator = torch.Generator().manual_seed(0)
    size = group or 64
    codes = torch.randint(-128, 128, (ROWS, COLUMNS // 2), dtype=torch.int8, generator=generator)
    scale, zeros = (torch.randn(COLUMNS // size, ROWS, generator=generator).to(dtype) for _ in range(2))
    config = {"format": "awq_w4a16"} | ({"group_size": group} if group else {})
    # The value of each code, written out.
    low, high = codes.view(torch.uint8) & 15, codes.view(torch.uint8) >> 4
    expected = torch.empty(ROWS, COLUMNS)
    for row in range(ROWS):
        for column in range(COLUMNS):
            code = (high if column % 2 else low)[row, column // 2].item()
            expected[row, column] = (code - 8) * scale[column // size, row] + zeros[column // size, row].float()
    if AWQ is not None:
        params = AWQ.Params(
            scale=scale.float(),
            zeros=zeros.float(),
            group_size=size,
            orig_dtype=torch.float32,
            orig_shape=(ROWS, COLUMNS),
        )
        expected = AWQ.dequantize(codes, params)
    check(tmp_path / "a.safetensors", expected, stored({"": codes, "_scale": scale, "_zeros": zeros}, config))


@pytest.mark.skipif(LEVELS is None, reason="this comfy-kitchen has no asym_w4a8_int8")
@pytest.mark.parametrize(
    ("bits", "arguments"),
    [
        (4, {}),
        (4, {"group_size": 32, "convrot_groupsize": 64}),
        (4, {"group_size": 4}),
        (4, {"codebook": False}),
        (4, {"symmetric": False}),
        (4, {"scale_dtype": torch.float32}),
        (6, {}),
        (6, {"group_size": 64}),
    ],
    ids=str,
)
def test_levels(tmp_path, bits, arguments):
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    try:
        packed, params = LEVELS.quantize(weight, bits=bits, **arguments)
    except (TypeError, ValueError):
        pytest.skip(f"this comfy-kitchen has no {bits} bits")
    options = {key: value for key, value in arguments.items() if key.endswith(("group_size", "groupsize"))}
    parts = {"": packed, "_s_rel": params.scale, "_s_channel": params.s_channel}
    parts |= {"_codebook": params.codebook} if params.codebook is not None else {}
    parts |= {"_correction": params.correction} if params.correction is not None else {}
    expected = LEVELS.dequantize(packed, params)
    assert ((expected - weight).norm() / weight.norm()).item() < 0.2
    tensors = stored(parts, {"format": "asym_w4a8_int8"} | options)
    check(tmp_path / "a.safetensors", expected, tensors)
    if params.scale.dtype == torch.float8_e4m3fn:
        tensors[f"{LAYER}.weight_s_rel"] = params.scale.view(torch.uint8)
        check(tmp_path / "b.safetensors", expected, tensors)


CODES = torch.zeros(ROWS, COLUMNS // 2, dtype=torch.int8)
SCALE = torch.ones(ROWS, COLUMNS // 16).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("format", "parts", "message"),
    [
        ("awq_w4a16", {"_scale": torch.ones(8, ROWS)}, "has no weight_zeros"),
        ("awq_w4a16", {"_scale": torch.ones(8, ROWS), "_zeros": torch.ones(ROWS, 8)}, r"weight_zeros is F32 of shape"),
        ("awq_w4a16", {"_scale": torch.ones(ROWS), "_zeros": torch.ones(8, ROWS)}, r"weight_scale is F32 of shape"),
        ("asym_w4a8_int8", {}, "has no scale"),
        ("asym_w4a8_int8", {"_s_rel": SCALE}, "has no weight_s_channel"),
        ("asym_w4a8_int8", {"_s_rel": SCALE[:, :5]}, r"256 bytes per row for 80 input channels"),
        ("asym_w4a8_int8", {"_s_rel": SCALE[:3]}, r"weight_s_rel is F8_E4M3 of shape"),
        ("asym_w4a8_int8", {"_s_rel": SCALE, "_s_channel": torch.ones(3)}, r"weight_s_channel is F32 of shape"),
        (
            "asym_w4a8_int8",
            {"_s_rel": SCALE, "_s_channel": torch.ones(ROWS), "_codebook": torch.ones(15)},
            r"weight_codebook is F32 of shape",
        ),
    ],
)
def test_malformed(tmp_path, format, parts, message):
    save_file(stored({"": CODES} | parts, {"format": format}), tmp_path / "a.safetensors")
    with pytest.raises(QuantError, match=rf"tensor blocks\.0\.ffn\.0\.weight: .*{message}"):
        open_checkpoint(tmp_path / "a.safetensors")
