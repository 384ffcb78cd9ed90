"""Source readers against safetensors' own, and what they refuse."""

from __future__ import annotations

import hashlib
import json
import pickle
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from wanquant.quant import QTYPES, QuantError
from wanquant.quant.checkpoint import open_checkpoint
from wanquant.quant.gguf_writer import GGUFWriter, TensorSpec
from wanquant.quant.safetensors_header import read_safetensors_header
from wanquant.quant.sources.files import HashedFile
from wanquant.tests.tiny_wan import write_tiny_wan

HEAD = {"dtype": "F32", "shape": [1, 2, 2], "data_offsets": [0, 16]}


def write_raw(path, header, data=bytes(16)):
    """A safetensors file with any header: bytes as they are, else JSON."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "model."])
def test_values_and_names(tmp_path, dtype, prefix):
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


def test_what_lies_outside_the_prefix_is_left_out(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"model.diffusion_model.head.modulation": torch.zeros(1, 2, 4), "vae.bias": torch.zeros(3)}, path)
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint.tensors) == ["head.modulation"]


@pytest.mark.parametrize("order", ["in file order", "backwards", "every second", "none"])
def test_sha256_is_that_of_the_file_however_it_is_read(tmp_path, order):
    path = write_tiny_wan(tmp_path / "a.safetensors", layers=1)
    with open_checkpoint(path) as checkpoint:
        tensors = list(checkpoint.tensors.values())
        step = {"in file order": 1, "backwards": -1, "every second": 2, "none": len(tensors)}[order]
        for tensor in tensors[::step]:
            half = tensor.shape[0] // 2
            tensor.read(0, half)
            tensor.read(half)
        assert checkpoint.file.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()


def test_glancing_reads_no_more_than_asked_for(tmp_path, monkeypatch):
    path = write_tiny_wan(tmp_path / "a.safetensors", layers=1)
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    with open_checkpoint(path) as checkpoint:
        n_read = 0
        peek = HashedFile.peek

        def counting(self, offset, nbytes):
            nonlocal n_read
            n_read += nbytes
            return peek(self, offset, nbytes)

        monkeypatch.setattr(HashedFile, "peek", counting)
        last = list(checkpoint.tensors.values())[-1]
        with checkpoint.file.glancing():
            last.read()
        assert n_read == last.nbytes
        for tensor in checkpoint.tensors.values():
            tensor.read()
        assert checkpoint.file.sha256() == expected
        assert n_read <= last.nbytes + path.stat().st_size


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


def test_quantized_gguf_is_a_source_that_is_lossy(tmp_path):
    weight = write_gguf(tmp_path / "a.gguf", QTYPES["Q8_0"])
    with open_checkpoint(tmp_path / "a.gguf") as checkpoint:
        tensor = checkpoint.tensors["head.modulation"]
        expected = QTYPES["Q8_0"].dequantize(QTYPES["Q8_0"].quantize(weight, effort="fast")).flatten()
        assert torch.equal(tensor.read(), expected)
        assert torch.equal(tensor.read(5, 41), expected[5:41])
        assert checkpoint.lossy == ("Q8_0",)


def test_unsupported_dtype_is_refused_by_tensor_and_dtype(tmp_path):
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
def test_other_models_are_refused_by_what_they_look_like(tmp_path, name, looks_like):
    save_file({name: torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(QuantError, match=f"not a Wan model.*looks like {looks_like}; only Wan and its"):
        open_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["a.ckpt", "a.pt", "a.safetensors"])
def test_pickles_are_refused_by_name_of_the_format(tmp_path, name, legacy):
    torch.save({"w": torch.zeros(9)}, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(QuantError, match="a PyTorch pickle"):
        open_checkpoint(tmp_path / name)


def test_plain_pickle_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(pickle.dumps({"weight": list(range(99))}, protocol=2))
    with pytest.raises(QuantError, match="a PyTorch pickle"):
        open_checkpoint(tmp_path / "a")


def test_header_length_that_looks_like_a_pickle_is_none(tmp_path):
    header = json.dumps({"head.modulation": HEAD}).encode().ljust(0x0280)  # bytes 80 02, as a pickle of protocol 2
    with open_checkpoint(write_raw(tmp_path / "a.safetensors", header)) as checkpoint:
        assert checkpoint.tensors["head.modulation"].shape == (1, 2, 2)


DEEP = b"[" * 1_000_000
TWICE = b'{"head.modulation": %b, "head.modulation": %b}' % (json.dumps(HEAD).encode(), json.dumps(HEAD).encode())


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{ ", "header is not JSON"),
        (b"\xff\xfe", "header is not JSON"),
        pytest.param(DEEP, "header is not JSON", id="nested a million times"),
        pytest.param(TWICE, "a name occurs twice", id="duplicate name"),
        ([1], "header is a JSON list"),
        ({"__metadata__": {"a": 1}, "a": HEAD}, "__metadata__ is not a table of strings"),
        ({"a": 3}, "tensor a: malformed entry"),
        ({"a": HEAD | {"dtype": 4}}, "tensor a: malformed entry"),
        ({"a": HEAD | {"shape": [0, 4]}}, "tensor a: 16 bytes for F32"),
        ({"a": HEAD | {"shape": [-2, -2]}}, "tensor a: malformed entry"),
        ({"a": HEAD | {"shape": [2.0, 2]}}, "tensor a: malformed entry"),
        ({"a": HEAD | {"data_offsets": [-16, 0]}}, "tensor a: malformed entry"),
        ({"a": HEAD | {"data_offsets": [16, 0]}}, "tensor a: malformed entry"),
        ({"a": HEAD | {"shape": [2**62, 2**62]}}, "tensor a: 16 bytes for F32"),
        ({"a": HEAD | {"shape": [3]}}, "tensor a: 16 bytes for F32"),
        ({"a": HEAD | {"data_offsets": [2**63, 2**63 + 16]}}, "tensor a: starts at byte 9223372036854775"),
        ({"a": HEAD, "b": HEAD}, "tensor b: starts at byte"),
        ({"a": HEAD | {"shape": [2], "data_offsets": [8, 16]}}, "tensors overlap or leave a hole"),
        ({"a": HEAD | {"shape": [8], "data_offsets": [0, 32]}}, "the file is cut or has a tail"),
        ({"a": HEAD | {"shape": [2], "data_offsets": [0, 8]}}, "the file is cut or has a tail"),
    ],
)
def test_damaged_headers(tmp_path, header, message):
    path = write_raw(tmp_path / "a.safetensors", header)
    with pytest.raises(QuantError, match=message) as error:
        open_checkpoint(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", [b"", b"\x10", b"\xff" * 8, bytes(8), (100_000_001).to_bytes(8, "little"), b"<html>.."]
)
def test_impossible_header_lengths(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(QuantError, match=r"header length \d+ in a file of \d+ bytes"):
        open_checkpoint(tmp_path / "a.safetensors")


def test_gguf_is_told(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"GGUF" + bytes(99))
    with pytest.raises(QuantError, match=r"a\.safetensors: a GGUF file, expected safetensors"):
        read_safetensors_header(tmp_path / "a.safetensors")


def test_missing_file(tmp_path):
    with pytest.raises(QuantError, match="no such file"):
        open_checkpoint(tmp_path / "a.safetensors")


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
        ({"weight": FP8, "comfy_quant": marker(), "weight_scale": torch.ones(())}, "format None is unknown"),
        ({"weight": FP8, "comfy_quant": torch.zeros(3, dtype=torch.uint8)}, "not the JSON table"),
        (
            {"weight": FP8, "weight_scale": torch.ones(3)},
            r"F32 of shape \(3,\), expected one number or \(4, 1\)",
        ),
        ({"weight": FP8, "weight_scale": torch.ones(1, dtype=torch.uint8)}, "scale is U8"),
        ({"weight": FP8, "weight_scale_inv": torch.ones(1, 1)}, "scaled in blocks by weight_scale_inv"),
        ({"weight": INT8, "weight_scale": torch.ones(())}, "I8 in format float8_e4m3fn, expected F32"),
        (
            {"weight": FP8, "comfy_quant": marker(format="nvfp4"), "weight_scale": torch.ones(())},
            "F8_E4M3 of shape .* in format nvfp4, expected U8",
        ),
        (
            {"weight": FP8.repeat(1, 4), "comfy_quant": marker(format="mxfp8"), "weight_scale": torch.ones(3)},
            "12 bytes of block scales, expected 512",
        ),
        (
            {
                "weight": INT8,
                "comfy_quant": marker(format="int8_tensorwise", convrot=True, convrot_groupsize=8),
                "weight_scale": torch.ones(()),
            },
            "convrot_groupsize is 8, expected a power of 4 that divides 8 columns",
        ),
        (
            {"weight": FP8, "weight_scale": torch.ones(()), "pre_quant_scale": torch.ones(3)},
            "_scale has shape",
        ),
        ({"weight": torch.zeros(0, 4)}, "dimension of size 0"),
    ],
)
def test_damaged_quantized_layers(tmp_path, parts, message):
    tensors = {f"blocks.0.ffn.0.{name}": value for name, value in parts.items()}
    save_file(tensors | {"head.modulation": torch.zeros(1, 2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(QuantError, match=r"tensor blocks\.0\.ffn\.0\.\w+: .*" + message):
        open_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize("text", ["{", "[]", '{"layers": 3}', '{"layers": {"a": 3}}'])
def test_damaged_quantization_metadata(tmp_path, text):
    tensors = {"head.modulation": torch.zeros(1, 2, 2)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"_quantization_metadata": text})
    with pytest.raises(QuantError, match="metadata _quantization_metadata is malformed"):
        open_checkpoint(tmp_path / "a.safetensors")


def test_block_scales_need_comfy_kitchen(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "comfy_kitchen", None)
    tensors = {
        "head.modulation": torch.zeros(1, 2, 2),
        "blocks.0.ffn.0.weight": torch.zeros(32, 32).to(torch.float8_e4m3fn),
        "blocks.0.ffn.0.weight_scale": torch.zeros(128, 4, dtype=torch.uint8),
        "blocks.0.ffn.0.comfy_quant": marker(format="mxfp8"),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(QuantError, match=r"ffn\.0\.weight: mxfp8 is decoded by the package comfy-kitchen"):
        open_checkpoint(tmp_path / "a.safetensors")


def test_factor_of_the_inputs_is_folded(tmp_path):
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


@pytest.mark.parametrize(
    "name",
    [
        "vace_blocks.0.before_proj.weight",
        "vace_patch_embedding.weight",
        "control_adapter.conv.weight",
        "blocks.0.audio_cross_attn.kv_linear.weight",
        "blocks.0.cross_attn.ip_adapter.registers",
        "blocks.0.self_attn.ref_adapter.to_k_ref.weight",
        "proj_model.proj.weight",
    ],
)
@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_modules_are_known_by_their_tensors(tmp_path, name, prefix):
    save_file(
        {prefix + name: torch.zeros(2, 2), prefix + "vace_blocks.1.after_proj.bias": torch.zeros(2)}, tmp_path / "a"
    )
    with open_checkpoint(tmp_path / "a") as checkpoint:
        assert checkpoint.tensors.keys() == {name, "vace_blocks.1.after_proj.bias"}
    save_file(
        {prefix + name: torch.zeros(2, 2), prefix + "blocks.0.self_attn.q.weight": torch.zeros(2)}, tmp_path / "b"
    )
    with pytest.raises(QuantError, match="not a Wan model"):
        open_checkpoint(tmp_path / "b")
