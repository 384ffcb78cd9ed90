"""LoRAs in GGUF files, as other tools write them, against the same LoRA loaded by ComfyUI."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from wanquant.ops.loading.diffusion_model import load_diffusion_model
from wanquant.ops.loading.lora import load_lora, read_lora
from wanquant.quant import QTYPES, QuantError
from wanquant.tests.ops.packed.patching import forward, load, lora, with_lora


def write(path, tensors, quantized=None, metadata=None):
    """Write tensors with the PyPI package gguf; `quantized` is the type of the factors whose rows it can hold."""
    writer = gguf.GGUFWriter(path, "wan")
    for key, value in (metadata or {}).items():
        writer.add_float32(key, value)
    for name, tensor in tensors.items():
        if quantized and tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            raw_dtype = gguf.GGMLQuantizationType[quantized]
            writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), raw_dtype), raw_dtype=raw_dtype)
        else:
            writer.add_tensor(name, np.atleast_1d(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def model(t2v):
    return load_diffusion_model(t2v[1])


def same_patches(left, right):
    assert left.patches.keys() == right.patches.keys() and left.patches
    for key, ((strength, mine, *_),) in left.patches.items():
        ((expected, other, *_),) = right.patches[key]
        assert strength == expected
        for a, b in zip(mine.weights, other.weights, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_plain_tensors(model, state, tmp_path, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in lora(state).items()}
    patched = load_lora(model, write(tmp_path / "a.gguf", tensors), 0.7)
    assert same_patches(patched, with_lora(model, tensors, 0.7))


def test_quantized_tensors(model, state, tmp_path):
    tensors = lora(state, rank=32)
    read = read_lora(write(tmp_path / "a.gguf", tensors, "Q8_0"))
    for name, tensor in tensors.items():
        expected = tensor
        if tensor.ndim == 2:
            expected = QTYPES["Q8_0"].dequantize(QTYPES["Q8_0"].quantize(tensor, effort="fast"))
        assert torch.equal(read[name].view(tensor.shape), expected)


def test_llama_cpps_names_and_alpha(model, state, tmp_path):
    tensors = {name: tensor for name, tensor in lora(state).items() if not name.endswith(".alpha")}
    theirs = {
        name.replace(".lora_A.weight", ".weight.lora_a").replace(".lora_B.weight", ".weight.lora_b"): tensor
        for name, tensor in tensors.items()
    }
    path = write(tmp_path / "a.gguf", theirs, metadata={"adapter.lora.alpha": 16.0})
    alphas = {name.replace("lora_A.weight", "alpha"): torch.tensor(16.0) for name in tensors if "lora_A" in name}
    assert same_patches(load_lora(model, path, 1.0), with_lora(model, tensors | alphas))


def test_names_of_other_trainers_and_rank_1(model, state, tmp_path):
    """The leading dimension of 1 is not in the file."""
    tensors = lora(state, rank=1)
    theirs = {name.replace("diffusion_model.", "transformer."): tensor.squeeze(0) for name, tensor in tensors.items()}
    assert same_patches(load_lora(model, write(tmp_path / "a.gguf", theirs), 1.0), with_lora(model, tensors))


Q = "diffusion_model.blocks.0.self_attn.q"
LEADING_ONES = {
    "LoHa of rank 1": {f"hada_w{i}_{part}": (256, 1) if part == "a" else (1, 256) for i in (1, 2) for part in "ab"},
    "LoKr": {"lokr_w1": (1, 4), "lokr_w2": (256, 64)},
    "LoKr of rank 1": {"lokr_w1": (4, 4), "lokr_w2_a": (64, 1), "lokr_w2_b": (1, 64)},
    "DoRA over inputs": {"lora_down.weight": (4, 256), "lora_up.weight": (256, 4), "dora_scale": (1, 256)},
    "DoRA over outputs": {"lora_down.weight": (1, 256), "lora_up.weight": (256, 1), "dora_scale": (256, 1)},
}


@pytest.mark.parametrize("shapes", LEADING_ONES.values(), ids=LEADING_ONES)
def test_leading_dimensions_of_one_are_restored(model, tmp_path, shapes):
    tensors = {f"{Q}.{name}": torch.rand(shape) for name, shape in shapes.items()}
    stored = {name: tensor.squeeze(0) for name, tensor in tensors.items()}
    assert stored.keys() == tensors.keys() and any(stored[name].ndim == 1 for name in stored)
    expected = with_lora(model, dict(tensors))
    patched = load_lora(model, write(tmp_path / "a.gguf", stored), 1.0)
    assert same_patches(patched, expected)
    assert torch.equal(forward(load(patched)), forward(load(expected)))


def test_differences_of_modulations(model, tmp_path):
    difference = torch.rand(1, 6, 256)
    path = write(tmp_path / "a.gguf", {"diffusion_model.blocks.0.modulation.diff": difference[0]})
    ((_, (_, (read,)), *_),) = load_lora(model, path, 1.0).patches["diffusion_model.blocks.0.modulation"]
    assert torch.equal(read, difference)


def test_other_files_are_refused(model, t2v, tmp_path):
    with pytest.raises(QuantError, match=r"not a LoRA .*load the file as a model"):
        load_lora(model, t2v[1], 1.0)
    other = write(tmp_path / "a.gguf", {"double_blocks.0.img_attn.qkv.lora_A.weight": torch.ones(4, 32)})
    with pytest.raises(QuantError, match="names a weight of this model"):
        load_lora(model, other, 1.0)
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(QuantError, match=r"b\.gguf"):
        load_lora(model, tmp_path / "b.gguf", 1.0)


LAYER = "diffusion_model.blocks.0.ffn.0"
FACTORS = {f"{LAYER}.lora_A.weight": torch.ones(4, 256), f"{LAYER}.lora_B.weight": torch.ones(256, 4)}


@pytest.mark.parametrize(
    "tensors",
    [
        FACTORS | {f"{LAYER}.alpha": torch.ones(2)},
        {f"{LAYER}.lora_B.weight": torch.ones(256, 4)},
        {f"{LAYER}.hada_w1_a": torch.ones(256, 4), f"{LAYER}.hada_w1_b": torch.ones(4, 256)},
    ],
    ids=["two alphas", "without down", "half a LoHa"],
)
def test_incomplete_tensors_are_refused(model, tmp_path, tensors):
    path = write(tmp_path / "a.gguf", tensors)
    with pytest.raises(QuantError, match=r"a\.gguf: ComfyUI cannot add this LoRA, whose tensors are incomplete"):
        load_lora(model, path, 1.0)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_an_alpha_that_is_not_finite_is_refused(model, tmp_path, alpha):
    path = write(tmp_path / "a.gguf", FACTORS, metadata={"adapter.lora.alpha": alpha})
    with pytest.raises(QuantError, match=r"adapter\.lora\.alpha: (nan|inf), expected a finite number"):
        load_lora(model, path, 1.0)
