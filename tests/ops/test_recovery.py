"""A recovery LoRA through the host's own LoRA loader, on the quantized model that it was made for."""

from __future__ import annotations

import logging

import comfy.sd
import comfy.utils
import pytest
import torch

from wanquant.ops.loading.diffusion_model import load_diffusion_model
from wanquant.quant.conversion.convert import convert
from wanquant.quant.recovery.recovery_lora import recover


@pytest.fixture(scope="module")
def run():
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(8, 16, 2, 8, 8, generator=generator), torch.full((8,), 500.0)
    text = torch.randn(8, 7, 4096, generator=generator)

    def run(patcher):
        comfy.model_management.load_models_gpu([patcher])
        with torch.no_grad():
            return patcher.model.diffusion_model(x, t, text)

    return run


def test_every_key_is_taken_and_the_output_comes_closer(t2v, run, tmp_path, caplog, sqnr):
    source = t2v[0]
    file = convert(source, tmp_path / "q2.gguf", "Q2_K", effort="fast").path
    lora = recover(file, source, tmp_path / "lora.safetensors", 4e-4).path
    expected = run(comfy.sd.load_diffusion_model(str(source), {"dtype": torch.float32}))
    model = load_diffusion_model(file, dtype=torch.float32)
    before = sqnr(expected, run(model))
    with caplog.at_level(logging.WARNING):
        patched, _ = comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(str(lora)), 1.0, 0)
    assert "lora key not loaded" not in caplog.text
    assert len(patched.patches) * 2 == len(comfy.utils.load_torch_file(str(lora)))
    assert sqnr(expected, run(patched)) > before + 0.5
