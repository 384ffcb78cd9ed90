"""Tuning through the rounding: it optimizes the weights that a file holds, and lowers the error of a block."""

from __future__ import annotations

import pytest
import torch

from wanquant.testing.hosts import checkout

if not (checkout() / "comfy").is_dir():
    pytest.skip("no ComfyUI: run `python3 dev.py setup` or set COMFYUI_PATH", allow_module_level=True)

from wanquant.quant import QTYPES
from wanquant.research._shared import Call
from wanquant.research.tuning import Block, Tuned


@pytest.fixture
def weight():
    return torch.randn(8, 256, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_0", "IQ4_XS"])
def test_rounds_to_what_a_file_holds(name, weight):
    importance = torch.rand(256, generator=torch.Generator().manual_seed(1))
    tuned = Tuned(QTYPES[name], weight, importance)
    assert torch.equal(tuned.rounded(), QTYPES[name].dequantize(QTYPES[name].quantize(weight, importance)))
    value = tuned()
    torch.testing.assert_close(value.detach(), tuned.rounded())
    value.sum().backward()
    assert torch.equal(tuned.latent.grad, torch.ones_like(weight))


def test_lowers_the_error_of_a_block():
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(256, 256, generator=generator)
    mixing = torch.randn(16, 256, generator=generator)
    tokens = [torch.randn(64, 16, generator=generator) @ mixing for _ in range(8)]
    module = torch.nn.Linear(256, 256, bias=False).requires_grad_(False)
    module.weight.copy_(weight)
    wanted = [module(given) for given in tokens]
    block = Block(module, [Call(given, {}) for given in tokens], tokens, wanted)
    tuned = Tuned(QTYPES["Q2_K"], weight, torch.ones(256))
    start = {"weight": tuned.rounded()}

    def error(weights):
        return sum((block.run(weights, item) - wanted[item]).square().sum().item() for item in range(8))

    rate = 0.01 * (start["weight"] - weight).square().mean().sqrt().item()
    assert error(block.tune({"weight": tuned}, {"weight": rate}, 64)) < 0.7 * error(start)
