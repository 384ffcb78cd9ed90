"""The host's dtype flags: they change no value of a file, and a GGUF computes as well as without them."""

from __future__ import annotations

import comfy.sd
import pytest
import torch
from comfy.cli_args import args

from wanquant.ops.loading.diffusion_model import load_diffusion_model
from wanquant.ops.packed.layout import is_packed
from wanquant.quant.conversion.convert import convert
from wanquant.quant.gguf.reader import open_gguf
from wanquant.testing.hosts import ROOT

CHECKPOINT = ROOT / "bench" / "tinywan" / "tinywan.safetensors"
FLAGS = ["fp8_e4m3fn", "fp8_e5m2", "fp8_e8m0fnu", "fp16", "bf16", "fp32", "fp64"]


@pytest.fixture(scope="module")
def tinywan(tmp_path_factory):
    return convert(CHECKPOINT, tmp_path_factory.mktemp("tinywan") / "q8.gguf", "Q8_0", effort="fast").path


def velocity(patcher):
    model = patcher.patch_model(torch.device("cpu"), lowvram_model_memory=0).diffusion_model
    dtype = patcher.model.get_dtype_inference()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 16, 3, 12, 12, generator=generator)
    text = torch.randn(1, 7, 4096, generator=generator)
    with torch.no_grad():
        return model(x.to(dtype), torch.tensor([500.0]), text.to(dtype)).float()


@pytest.fixture(scope="module")
def unquantized():
    return velocity(comfy.sd.load_diffusion_model(str(CHECKPOINT), {"dtype": torch.float32}))


@pytest.mark.parametrize("flag", FLAGS)
def test_unquantized_tensors_stay_as_they_are(tinywan, unquantized, sqnr, monkeypatch, flag):
    expected = sqnr(unquantized, velocity(load_diffusion_model(tinywan)))
    assert expected > 55
    monkeypatch.setattr(args, f"{flag}_unet", True)
    patcher = load_diffusion_model(tinywan)
    loaded = patcher.model.diffusion_model.state_dict()
    plain = {name: t for name, t in open_gguf(tinywan).tensors.items() if not is_packed(loaded[name])}
    assert {"patch_embedding.weight", "head.modulation", "blocks.0.norm3.weight"} <= plain.keys()
    for name, tensor in plain.items():
        values = tensor.qtype.dequantize(tensor.data).view(loaded[name].shape)
        assert torch.equal(loaded[name].double(), values.double()), name
    assert sqnr(unquantized, velocity(patcher)) == pytest.approx(expected, abs=0.05)


def test_own_compute_dtype_comes_before_a_flag(tinywan, monkeypatch):
    monkeypatch.setattr(args, "fp8_e4m3fn_unet", True)
    patcher = load_diffusion_model(tinywan, dtype=torch.bfloat16)
    assert patcher.model.get_dtype_inference() == torch.bfloat16
    assert patcher.model.diffusion_model.head.modulation.dtype == torch.bfloat16
