"""Sequential rounding: a layer sees the outputs of the quantized layers before it, and corrects for their errors."""

from __future__ import annotations

import pytest
import torch

from wanquant.testing.hosts import checkout

if not (checkout() / "comfy").is_dir():
    pytest.skip("no ComfyUI: run `python3 dev.py setup` or set COMFYUI_PATH", allow_module_level=True)

from wanquant.research._shared import Call
from wanquant.research.sequential import _EVERY, corrected, layer_inputs
from wanquant.tests.quant.samples import correlated


def test_corrected_weight_makes_up_for_errors_of_the_inputs():
    weight, unquantized = torch.randn(32, 128, generator=torch.Generator().manual_seed(0)), correlated(128)
    inputs = unquantized + 0.3 * unquantized.roll(1, 1)
    wanted = unquantized @ weight.T
    errors = [(wanted - inputs @ w.T).square().mean() for w in (weight, corrected(weight, unquantized, inputs))]
    assert errors[1] < 0.3 * errors[0]
    torch.testing.assert_close(corrected(weight, inputs, inputs), weight)


def test_inputs_are_those_of_the_layers_asked_for():
    block = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 4), torch.nn.Linear(4, 2))
    tokens = [torch.randn(2, 8, 8) for _ in range(3)]
    run = []
    block[3].register_forward_hook(lambda *_: run.append(1))
    rows = layer_inputs(block, tokens, [Call(part, {}) for part in tokens], ("0", "2"))
    assert not run, "what lies behind the last layer is not needed"
    every = torch.cat([part.flatten(0, 1)[::_EVERY] for part in tokens])
    assert torch.equal(rows["0"], every)
    torch.testing.assert_close(rows["2"], block[:2](every))
    block(tokens[0])
    assert run == [1] and len(rows["0"]) == len(every), "nothing stays hooked"
