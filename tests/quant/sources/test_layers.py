"""Quantized layers: scales are multiplied in, markers are left out, and malformed ones are refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from wanquant.quant import QuantError
from wanquant.quant.sources.checkpoint import open_checkpoint

FP8 = torch.ones(4, 8).to(torch.float8_e4m3fn)
INT8 = torch.ones(4, 8, dtype=torch.int8)


def marker(**config):
    return torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"weight": INT8}, "dtype I8 without ComfyUI's scales"),
        ({"weight": INT8, "comfy_quant": marker(format="int8_tensorwise")}, "'int8_tensorwise' but has no scale"),
        ({"weight": FP8, "comfy_quant": marker(format="fp3"), "weight_scale": torch.ones(())}, "'fp3' is unknown"),
        (
            {"weight": FP8, "comfy_quant": marker(), "weight_scale": torch.ones(())},
            "{}, expected a JSON object with",
        ),
        (
            {"weight": FP8, "comfy_quant": torch.zeros(3, dtype=torch.uint8)},
            "expected the JSON object that ComfyUI writes",
        ),
        (
            {"weight": FP8, "weight_scale": torch.ones(3)},
            r"F32 of shape \(3,\), expected one number or \(4, 1\)",
        ),
        ({"weight": FP8, "weight_scale": torch.ones(1, dtype=torch.uint8)}, "scale is U8"),
        ({"weight": FP8, "weight_scale_inv": torch.ones(1, 1)}, "its scale is weight_scale_inv"),
        ({"weight": INT8.short(), "weight_scale": torch.ones(())}, "I16 in format float8_e4m3fn, expected F32"),
        ({"weight": INT8, "weight_scale": torch.ones(1, 8)}, r"F32 of shape \(1, 8\), expected one number or \(4, 1\)"),
        (
            {"weight": FP8, "comfy_quant": marker(format="nvfp4"), "weight_scale": torch.ones(())},
            "F8_E4M3 of shape .* in format nvfp4, expected U8",
        ),
        (
            {"weight": FP8.repeat(1, 4), "comfy_quant": marker(format="mxfp8"), "weight_scale": torch.ones(3)},
            "12 bytes of block scales of F32, expected 512",
        ),
        (
            {
                "weight": INT8,
                "comfy_quant": marker(format="int8_tensorwise", convrot=True, convrot_groupsize=8),
                "weight_scale": torch.ones(()),
            },
            "convrot_groupsize is 8, expected a power of 4 that divides the 8 input channels",
        ),
        (
            {"weight": FP8, "weight_scale": torch.ones(()), "pre_quant_scale": torch.ones(3)},
            "_scale has shape",
        ),
        ({"weight": torch.zeros(0, 4)}, "dimension of size 0"),
    ],
)
def test_damaged_quantized_layers_are_refused(tmp_path, parts, message):
    tensors = {f"blocks.0.ffn.0.{name}": value for name, value in parts.items()}
    save_file(tensors | {"head.modulation": torch.zeros(1, 2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(QuantError, match=r"tensor blocks\.0\.ffn\.0\.\w+: .*" + message):
        open_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize("text", ["{", "[]", '{"layers": 3}', '{"layers": {"a": 3}}'])
def test_damaged_quantization_metadata_is_refused(tmp_path, text):
    tensors = {"head.modulation": torch.zeros(1, 2, 2)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"_quantization_metadata": text})
    with pytest.raises(QuantError, match=r"metadata _quantization_metadata is (malformed|not JSON)"):
        open_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize("scale", ["weight_scale", "scale_weight"])
@pytest.mark.parametrize("shape", [(), (1,), (4,), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_scales_without_a_marker_are_multiplied_in(tmp_path, scale, shape, dtype):
    """lightx2v writes one per row, beside INT8 and FP8."""
    codes, scales = torch.arange(-16, 16).view(4, 8).to(dtype), torch.rand(shape)
    tensors = {"blocks.0.ffn.0.weight": codes, f"blocks.0.ffn.0.{scale}": scales}
    save_file(tensors | {"head.modulation": torch.zeros(1, 2, 2)}, tmp_path / "a.safetensors")
    with open_checkpoint(tmp_path / "a.safetensors") as checkpoint:
        weight = checkpoint.tensors["blocks.0.ffn.0.weight"]
        expected = codes.float() * (scales.view(-1, 1) if scales.numel() > 1 else scales)
        assert torch.equal(weight.read().view(4, 8), expected)
        assert torch.equal(weight.read(8, 24), expected.flatten()[8:24])


def test_factor_of_the_inputs_is_multiplied_in(tmp_path):
    factor = torch.rand(8)
    tensors = {"weight": FP8, "weight_scale": torch.tensor(2.0), "pre_quant_scale": factor}
    tensors = {f"blocks.0.ffn.0.{name}": value for name, value in tensors.items()}
    save_file(tensors | {"head.modulation": torch.zeros(1, 2, 2)}, tmp_path / "a.safetensors")
    with open_checkpoint(tmp_path / "a.safetensors") as checkpoint:
        weight = checkpoint.tensors["blocks.0.ffn.0.weight"].read().view(4, 8)
        assert torch.equal(weight, (2 * factor).expand(4, 8))


def test_empty_markers_are_left_out(tmp_path):
    tensors = {"head.modulation": torch.zeros(1, 2, 2), "model_type.Wan2_1-FLF2V-14B-720P": torch.zeros(0)}
    save_file(tensors, tmp_path / "a.safetensors")
    with open_checkpoint(tmp_path / "a.safetensors") as checkpoint:
        assert list(checkpoint.tensors) == ["head.modulation"]


def rotated(layer, **config):
    parts = {"weight": torch.ones(4, 256, dtype=torch.int8), "weight_scale": torch.ones(4, 1)}
    if config:
        parts["comfy_quant"] = marker(**config)
    return {f"blocks.0.ffn.{layer}.{name}": value for name, value in parts.items()}


CONVROT = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}


@pytest.mark.parametrize("metadata", [None, {"blocks.0.ffn.0": CONVROT}])
def test_integers_that_lack_the_marker_of_other_layers_are_refused(tmp_path, metadata):
    """ComfyUI would take their codes for weights."""
    tensors = rotated(0, **({} if metadata else CONVROT)) | rotated(2) | {"head.modulation": torch.zeros(1, 2, 2)}
    texts = metadata and {"_quantization_metadata": json.dumps({"layers": metadata})}
    save_file(tensors, tmp_path / "a.safetensors", metadata=texts)
    with pytest.raises(QuantError, match=r"tensor blocks\.0\.ffn\.2\.weight: integers with a scale, but without the"):
        open_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("declared", "contradicts"),
    [
        ({"format": "int8_tensorwise"}, True),
        ({"format": "convrot_w4a4"}, True),
        (CONVROT, False),
        ({"format": "int8_tensorwise", "params": {"convrot": True}}, False),
    ],
)
def test_a_marker_that_contradicts_the_metadata_is_named(tmp_path, declared, contradicts):
    """ComfyUI follows the metadata without a word."""
    tensors = rotated(0, **CONVROT) | {"head.modulation": torch.zeros(1, 2, 2)}
    if declared["format"] == "convrot_w4a4":
        tensors["blocks.0.ffn.0.weight_scale"] = torch.ones(4)
    text = json.dumps({"layers": {"blocks.0.ffn.0": declared}})
    save_file(tensors, tmp_path / "a.safetensors", metadata={"_quantization_metadata": text})
    with open_checkpoint(tmp_path / "a.safetensors") as checkpoint:
        found = [text for text in checkpoint.warnings if "by its comfy_quant, but" in text]
    assert len(found) == contradicts
    assert not found or "a.safetensors: blocks.0.ffn.0 is {" in found[0]
