"""Rounding of a block: its stages, the corrections of weights and biases, and what they gain."""

from __future__ import annotations

import pytest
import torch

from wanquant.quant import QTYPES
from wanquant.quant.tuning import block
from wanquant.quant.tuning.block import BlockModule, BlockTuning, StageInputs, _Sums
from wanquant.quant.tuning.states import Chains
from wanquant.tests.quant.samples import correlated


class Toy(torch.nn.Module):
    """A block of three Linears, the first two of which share their input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = (torch.nn.Linear(256, 256) for _ in range(3))

    def forward(self, x, scale):
        y = x * scale
        return x + self.o(torch.tanh(self.q(y)) * self.k(y))


class Calls:
    """Four calls of a toy."""

    def __init__(self):
        self.states = [correlated(256)[64 * n : 64 * n + 64].view(1, 64, 256) for n in range(4)]

    def __len__(self):
        return len(self.states)

    def others(self, _index, _device):
        return {"scale": 0.5}


@pytest.fixture
def module():
    torch.manual_seed(0)
    return BlockModule(Toy().requires_grad_(False))


def weights(module):
    return {name: tensor.detach() for name, tensor in module.module.named_parameters()}


def test_stages_are_the_layers_of_one_input(module):
    assert module.stages(weights(module), Calls().states[0], {"scale": 0.5}) == [["q", "k"], ["o"]]
    assert not any(layer._forward_pre_hooks for layer in module.module.modules()), "nothing stays hooked"


@pytest.mark.parametrize("centered", [False, True])
def test_corrected_weight_makes_up_for_errors_of_the_inputs(monkeypatch, centered):
    monkeypatch.setattr(block, "_RIDGE", 0.05)
    weight, exact = torch.randn(32, 128, generator=torch.Generator().manual_seed(0)), correlated(128)
    quantized = exact + 0.3 * exact.roll(1, 1)
    sums, same = _Sums(), _Sums()
    sums.add(exact, quantized)
    same.add(exact, exact)
    wanted = exact @ weight.T
    errors = [
        (wanted - quantized @ w.T).square().mean()
        for w in (weight, StageInputs(sums, None, centered=centered).corrected(weight))
    ]
    assert errors[1] < 0.3 * errors[0]
    torch.testing.assert_close(StageInputs(same, None, centered=centered).corrected(weight), weight)


def test_missing_bias_makes_the_mean_right():
    weight, exact = torch.randn(32, 128), correlated(128) + 1
    rounded, quantized = weight + 0.1, exact * 0.9
    sums = _Sums()
    sums.add(exact, quantized)
    missing = StageInputs(sums, None, centered=True).missing(weight, rounded)
    torch.testing.assert_close((quantized @ rounded.T + missing).mean(0), (exact @ weight.T).mean(0), atol=1e-4, rtol=0)


def test_tuned_block_is_nearer_than_one_rounded_layer_by_layer(module):
    calls, source = Calls(), weights(module)
    types = {f"{name}.weight": QTYPES["Q2_K"] for name in "qko"}
    noisy = [
        state + 0.1 * torch.randn(state.shape, generator=torch.Generator().manual_seed(1)) for state in calls.states
    ]
    chains, steps = Chains(calls.states.__getitem__, noisy.__getitem__), []
    tuning = BlockTuning(module, source, types, calls, chains, torch.device("cpu"), steps.append)
    tuned = tuning.run("fast")
    assert steps and tuned.packed.keys() == types.keys() and tuned.weights.keys() == source.keys()
    for name, packed in tuned.packed.items():
        assert torch.equal(types[name].dequantize(packed), tuned.weights[name])
    apart = {**source, **{name: types[name].dequantize(types[name].quantize(source[name])) for name in types}}
    errors = []
    for found in (tuned.weights, apart):
        pairs = [(tuning.output(source, chains.exact)(n), tuning.output(found, chains.quantized)(n)) for n in range(4)]
        errors.append(sum((wanted - output).square().sum() for wanted, output in pairs))
    assert errors[0] < errors[1]
