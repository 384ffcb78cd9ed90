"""Quantized checkpoints that the host reads: our folded weights equal the host's own dequantization."""

from __future__ import annotations

import json

import comfy.sd
import pytest
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from safetensors.torch import load_file, save_file

from wanquant.quant import QTYPES, convert, open_gguf
from wanquant.quant.sources.checkpoint import open_checkpoint

# name: (format, arguments of the host's quantizer, options of its marker)
FORMATS = {
    "fp8": ("float8_e4m3fn", {}, {}),
    "fp8-e5m2": ("float8_e5m2", {}, {}),
    "int8": ("int8_tensorwise", {}, {}),
    "int8-rows": ("int8_tensorwise", {"per_channel": True}, {}),
    "int8-convrot": ("int8_tensorwise", {"per_channel": True, "convrot": True}, {"convrot": True}),
    "int8-convrot-64": (
        "int8_tensorwise",
        {"per_channel": True, "convrot": True, "convrot_groupsize": 64},
        {"params": {"convrot": True, "convrot_groupsize": 64}},
    ),
    "convrot-w4a4": ("convrot_w4a4", {}, {"convrot_groupsize": 256}),
    "nvfp4": ("nvfp4", {}, {}),
    "mxfp8": ("mxfp8", {}, {}),
}


def is_quantized(name):
    return name.startswith("blocks.") and (".ffn." in name or "attn.v" in name) and name.endswith(".weight")


def quantized(state, name):
    """The state dict as the host stores it, without markers, and the configuration of each layer."""
    kind, arguments, options = FORMATS[name]
    if kind not in QUANT_ALGOS:
        pytest.skip(f"this ComfyUI has no {kind}, which came later")
    stored, layers = {}, {}
    for key, value in state.items():
        if not is_quantized(key):
            stored[key] = value
            continue
        packed = QuantizedTensor.from_float(value.float(), QUANT_ALGOS[kind]["comfy_tensor_layout"], **arguments)
        stored |= {key + suffix: tensor.contiguous() for suffix, tensor in parts(packed).items()}
        layers[key.removesuffix(".weight")] = {"format": kind} | options
    return stored, layers


def parts(packed):
    return packed.layout_cls.state_dict_tensors(packed._qdata, packed._params)


@pytest.fixture(scope="module")
def state(tiny_wan, tmp_path_factory):
    path = tiny_wan["write_tiny_wan"](tmp_path_factory.mktemp("wan") / "a.safetensors", layers=1, ffn_dim=768)
    return load_file(path)


def host_weights(stored, metadata=None):
    """All weights of the host's model, dequantized in float32."""
    patcher = comfy.sd.load_diffusion_model_state_dict(dict(stored), {"dtype": torch.float32}, metadata=metadata)
    weights = patcher.model.diffusion_model.state_dict()
    for name, module in patcher.model.diffusion_model.named_modules():
        if isinstance(getattr(module, "weight", None), QuantizedTensor):
            weights[f"{name}.weight"] = module.weight.dequantize().float()
    return weights


def check(path, expected, state):
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tensors.keys() == state.keys()
        for name, tensor in checkpoint.tensors.items():
            assert tensor.shape == state[name].shape
            value = tensor.read()
            torch.testing.assert_close(value.float().view(tensor.shape), expected[name].float(), rtol=1e-6, atol=1e-7)
            middle = tensor.read(len(value) // 3, len(value) // 2)
            torch.testing.assert_close(middle, value[len(value) // 3 : len(value) // 2], rtol=0, atol=1e-7)


@pytest.mark.parametrize("marked", ["tensors", "metadata"])
@pytest.mark.parametrize("name", FORMATS)
def test_scales_are_folded_as_the_host_does(name, marked, state, tmp_path):
    stored, layers = quantized(state, name)
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    if marked == "tensors":
        metadata = None
        for layer, config in layers.items():
            stored[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)
    save_file(stored, tmp_path / "a.safetensors", metadata=metadata)
    check(tmp_path / "a.safetensors", host_weights(stored, metadata), state)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("marker", [torch.zeros(0), torch.zeros(2)], ids=["empty", "two"])
def test_scaled_fp8_of_the_time_before_markers(state, tmp_path, marker, prefix):
    stored, layers = quantized(state, "fp8")
    for layer in layers:
        stored[f"{layer}.scale_weight"] = stored.pop(f"{layer}.weight_scale")
        stored[f"{layer}.scale_input"] = torch.ones(())
    stored["scaled_fp8"] = marker.to(torch.float8_e4m3fn)
    stored = {prefix + key: value for key, value in stored.items()}
    save_file(stored, tmp_path / "a.safetensors")
    check(tmp_path / "a.safetensors", host_weights(stored), state)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_unscaled_fp8(state, tmp_path, dtype):
    stored = {key: value.to(dtype) if is_quantized(key) else value for key, value in state.items()}
    save_file(stored, tmp_path / "a.safetensors")
    check(tmp_path / "a.safetensors", {key: value.float() for key, value in stored.items()}, state)


@pytest.mark.parametrize("name", ["fp8", "int8-convrot", "nvfp4"])
def test_conversion_of_a_quantized_checkpoint(name, state, tmp_path, caplog):
    stored, layers = quantized(state, name)
    for layer, config in layers.items():
        stored[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)
    save_file(stored, tmp_path / "a.safetensors")
    expected = host_weights(stored)
    for recipe in ("BF16", "Q8_0"):
        report = convert(tmp_path / "a.safetensors", tmp_path / f"{recipe}.gguf", recipe, effort="fast")
        assert "is quantized already" in caplog.text
        tensors = open_gguf(report.path).tensors
        assert tensors.keys() == state.keys()
        for layer in layers:
            weight = expected[f"{layer}.weight"]
            packed = QTYPES[recipe].quantize(weight, effort="fast")
            torch.testing.assert_close(
                tensors[f"{layer}.weight"].dequantize(), QTYPES[recipe].dequantize(packed), rtol=0.02, atol=1e-6
            )
