"""Checkpoints: their tensors against those that safetensors reads, and the files that are refused."""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from wanquant.quant import QTYPES, QuantError, convert, open_gguf
from wanquant.quant.gguf.layout import TensorSpec
from wanquant.quant.gguf.writer import GGUFWriter
from wanquant.quant.sources.checkpoint import open_checkpoint
from wanquant.testing.tiny_wan import write_tiny_wan


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "model."])
def test_names_and_values_are_those_of_safetensors(tmp_path, dtype, prefix):
    path = write_tiny_wan(tmp_path / "a.safetensors", layers=1, dtype=dtype, prefix=prefix, metadata={"config": "{}"})
    expected = load_file(path)
    with open_checkpoint(path) as checkpoint:
        assert {prefix + name for name in checkpoint.tensors} == expected.keys()
        assert checkpoint.metadata == {"config": "{}"}
        assert checkpoint.stored == {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
        for name, tensor in checkpoint.tensors.items():
            assert torch.equal(tensor.read().view(tensor.shape), expected[prefix + name])
        ffn = checkpoint.tensors["blocks.0.ffn.0.weight"]
        assert torch.equal(ffn.read(5, 99), expected[prefix + "blocks.0.ffn.0.weight"].flatten()[5:99])


def test_tensors_outside_the_prefix_are_left_out(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"model.diffusion_model.head.modulation": torch.zeros(1, 2, 4), "vae.bias": torch.zeros(3)}, path)
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint.tensors) == ["head.modulation"]


def write_gguf(path, qtype):
    weight = torch.randn(2, 32)
    specs = [TensorSpec("model.diffusion_model.head.modulation", qtype, (2, 32))]
    with GGUFWriter(path, {"wanquant.source_metadata.config": "{}"}, specs) as writer:
        writer.write(specs[0].name, qtype.quantize(weight, effort="fast"))
    return weight


def test_float_gguf_is_a_source(tmp_path):
    weight = write_gguf(tmp_path / "a.gguf", QTYPES["F32"])
    with open_checkpoint(tmp_path / "a.gguf") as checkpoint:
        assert torch.equal(checkpoint.tensors["head.modulation"].read().view(2, 32), weight)
        assert checkpoint.metadata == {"config": "{}"}


def test_quantized_gguf_is_a_source_and_reports_its_format(tmp_path):
    weight = write_gguf(tmp_path / "a.gguf", QTYPES["Q8_0"])
    with open_checkpoint(tmp_path / "a.gguf") as checkpoint:
        tensor = checkpoint.tensors["head.modulation"]
        expected = QTYPES["Q8_0"].dequantize(QTYPES["Q8_0"].quantize(weight, effort="fast")).flatten()
        assert torch.equal(tensor.read(), expected)
        assert torch.equal(tensor.read(5, 41), expected[5:41])
        assert checkpoint.quantized_formats == ("Q8_0",)


def test_numbers_beside_the_weights_are_converted(tmp_path, source):
    beside = {
        "position_ids": torch.arange(5),
        "steps": torch.tensor([7], dtype=torch.int32),
        "flags": torch.tensor([True, False]),
        "blocks.0.norm3.weight": torch.full((256,), 1.5, dtype=torch.float64),
    }
    save_file(
        {**load_file(source), **{f"model.diffusion_model.{n}": t for n, t in beside.items()}},
        tmp_path / "a.safetensors",
    )
    converted = convert(tmp_path / "a.safetensors", tmp_path / "a.gguf", "Q8_0", effort="fast").path
    file = open_gguf(converted)
    for name, tensor in beside.items():
        assert torch.equal(file.tensors[name].dequantize(), tensor.float())
    with open_checkpoint(converted) as checkpoint:
        assert torch.equal(checkpoint.tensors["position_ids"].read(), torch.arange(5.0))


def test_unsupported_dtype_is_refused_with_its_tensor_and_dtype(tmp_path):
    tensors = {"head.modulation": torch.zeros(4), "blocks.0.ffn.0.weight": torch.zeros(4).to(torch.int64)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(
        QuantError, match=r"blocks\.0\.ffn\.0\.weight: dtype I64 without ComfyUI's scales cannot be conv"
    ):
        open_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("name", "looks_like"),
    [
        ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", "a LoRA"),
        ("encoder.layers.0.mlp.weight", "a text encoder"),
        ("decoder.head.0.gamma", "a VAE"),
        ("double_blocks.0.img_attn.qkv.weight", "a Flux or Hunyuan model"),
        ("x", "something else"),
    ],
)
def test_other_models_are_refused_with_what_they_look_like(tmp_path, name, looks_like):
    save_file({name: torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(QuantError, match=f"not a Wan model.*looks like {looks_like}; choose a Wan"):
        open_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["a.ckpt", "a.pt", "a.safetensors"])
def test_torch_pickles_are_refused(tmp_path, name, legacy):
    torch.save({"w": torch.zeros(9)}, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(QuantError, match="a PyTorch pickle"):
        open_checkpoint(tmp_path / name)


def test_plain_pickle_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(pickle.dumps({"weight": list(range(99))}, protocol=2))
    with pytest.raises(QuantError, match="a PyTorch pickle"):
        open_checkpoint(tmp_path / "a")


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(QuantError, match="no such file"):
        open_checkpoint(tmp_path / "a.safetensors")
