"""LoRAs and other patches of packed weights: their effect on the dequantized rows."""

from __future__ import annotations

from functools import cache

import comfy.lora
import comfy.sd
import pytest
import torch
from comfy import weight_adapter
from comfy.quant_ops import QuantizedTensor
from torch.nn.functional import linear

from wanquant.ops.loading.diffusion_model import load_diffusion_model
from wanquant.ops.packed import matmul
from wanquant.ops.packed.layout import dense, pack
from wanquant.ops.packed.linear import GGUFOps, packed_modules
from wanquant.ops.packed.patches import OnTheFly
from wanquant.quant import QTYPES
from wanquant.tests.ops.packed.patching import KEY, forward, functions, load, lora, with_lora


@pytest.mark.parametrize("memory", [None, 1], ids=["loaded", "low_vram"])
@pytest.mark.parametrize("strength", [1.0, -0.7, 0.0])
def test_equals_the_dense_model_with_the_lora(strength, memory, model, decoded, state):
    tensors = lora(state, bias=True)
    expected = forward(load(with_lora(decoded, tensors, strength)))
    patched = load(with_lora(model, tensors, strength), memory)
    torch.testing.assert_close(forward(patched), expected, atol=2e-4, rtol=2e-4)
    assert len(functions(patched)) == 10


@pytest.mark.parametrize(
    "extra",
    [
        {"dora_scale": lambda w: torch.rand(w.shape[0], 1) + 0.5},
        {"diff": lambda w: torch.randn(w.shape) / 50},
        {"set_weight": lambda w: torch.randn(w.shape) / 16},
    ],
    ids=["dora", "diff", "set_weight"],
)
def test_other_adapters_take_the_hosts_way(extra, model, decoded, state):
    tensors = lora(state, **extra)
    if "dora_scale" not in extra:
        tensors = {key: value for key, value in tensors.items() if key.endswith(tuple(extra))}
    expected = forward(load(with_lora(decoded, tensors)))
    patched = load(with_lora(model, tensors))
    assert len(functions(patched)) == 10
    torch.testing.assert_close(forward(patched), expected, atol=2e-4, rtol=2e-4)


def test_opposite_loras_cancel(model, state):
    expected = forward(load(model))
    tensors = lora(state)
    both = load(with_lora(with_lora(model, tensors, 1.0), tensors, -1.0))
    torch.testing.assert_close(forward(both), expected, atol=2e-5, rtol=2e-5)


def test_strength_zero_is_exact(model, state):
    expected = forward(load(model))
    assert torch.equal(forward(load(with_lora(model, lora(state), 0.0))), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_compute_dtype(dtype, t2v, state):
    """Assert that the patched weight is within two roundings of the exact one."""
    patched = load(with_lora(load_diffusion_model(t2v[1], dtype=dtype), lora(state)))
    _, module = next((key, m) for key, m in packed_modules(patched.model) if key == KEY)
    weight = module.weight_function[0](module.weight.dequantize())
    stem = KEY.removesuffix(".weight")
    exact = QTYPES["Q8_0"].dequantize(module.weight._qdata)
    exact += 0.5 * lora(state)[f"{stem}.lora_B.weight"] @ lora(state)[f"{stem}.lora_A.weight"]
    assert weight.dtype == dtype
    torch.testing.assert_close(weight.float(), exact, rtol=2 * torch.finfo(dtype).eps, atol=4e-3)


def test_model_as_lora_hook(model, state):
    """Test a difference to the weights of another model, which needs those of this model."""
    target = torch.randn(512, 256)
    patched = model.clone()
    patched.add_patches({KEY: ("model_as_lora", (target,))}, 1.0)
    load(patched)
    _, module = next((key, m) for key, m in packed_modules(patched.model) if key == KEY)
    torch.testing.assert_close(module.weight_function[0](module.weight.dequantize()), target)


def test_the_hosts_bypass_lora(model, state):
    """Test LoRAs that are added to activations instead of weights; the host must find the packed layers too."""
    # Hosts that pass the activation to ffn.2 add the bypass to the input of the activation.
    factors = {name: factor for name, factor in lora(state).items() if ".ffn.2." not in name}
    expected = forward(load(with_lora(model, factors)))
    model.detach()
    bypass, _ = comfy.sd.load_bypass_lora_for_models(model, None, factors, 1.0, 0)
    load(bypass)
    bypass.inject_model()
    torch.testing.assert_close(forward(bypass), expected, atol=2e-4, rtol=2e-4)
    bypass.eject_model()


# One layer, in tiles of 16 rows.

ROWS, COLUMNS = 96, 256


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) / 8


def adapter(name, *weights):
    return getattr(weight_adapter, f"{name}Adapter")(set(), weights)


@cache
def packed(seed=0):
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))
    return pack(QTYPES["Q8_0"].quantize(weight, effort="fast"), "Q8_0", (ROWS, COLUMNS), torch.float32)


def decode(weight, inplace=False):
    return dense(weight, weight.dtype) if isinstance(weight, QuantizedTensor) else weight


UP, DOWN, ALPHA = random(ROWS, 4), random(4, COLUMNS), 2.0
NORM = torch.rand(ROWS, 1) + 0.5
LORA = adapter("LoRA", UP, DOWN, ALPHA, None, None, None)
TUCKER = (UP, DOWN[..., None, None], ALPHA, random(4, 4, 1, 1), None, None)
# Name -> value, and the number of rows at whose multiples it can be sliced.
VALUES = {
    "lora": (LORA, 1),
    "lora_without_alpha": (adapter("LoRA", UP, DOWN, None, None, None, None), 1),
    "lora_with_middle": (adapter("LoRA", *TUCKER), ROWS),
    "dora": (adapter("LoRA", UP, DOWN, ALPHA, None, NORM, None), 1),
    "dora_of_columns": (adapter("LoRA", UP, DOWN, ALPHA, None, torch.rand(1, COLUMNS) + 0.5, None), ROWS),
    "loha": (adapter("LoHa", UP, DOWN, ALPHA, 2 * UP, DOWN + 1, None, None, None), 1),
    "loha_dora": (adapter("LoHa", UP, DOWN, ALPHA, 2 * UP, DOWN + 1, None, None, NORM), 1),
    "lokr": (adapter("LoKr", random(4, 8), random(24, 32), None, None, None, None, None, None, None), 24),
    "lokr_of_factors": (
        adapter("LoKr", None, None, ALPHA, random(12, 2), random(2, 8), random(8, 3), random(3, 32), None, None),
        8,
    ),
    "oft": (adapter("OFT", random(6, 16, 16), None, None, None), 16),
    "oft_dora": (adapter("OFT", random(12, 8, 8), None, 0.0, NORM), 8),
    "oft_with_limit": (adapter("OFT", random(6, 16, 16), None, 0.01, None), ROWS),
    "boft": (adapter("BOFT", random(2, 12, 8, 8), None, 0.0, None), ROWS),
    "glora": (adapter("GLoRA", random(COLUMNS, 4), random(4, COLUMNS), UP, DOWN, None, None), ROWS),
    "diff": (("diff", (random(ROWS, COLUMNS),)), 1),
    "diff_unnamed": ((random(ROWS, COLUMNS),), 1),
    "set": (("set", (random(ROWS, COLUMNS),)), 1),
    "model_as_lora": (("model_as_lora", (random(ROWS, COLUMNS),)), 1),
    "merge": ([(packed(1), decode)], 1),
    "merge_with_lora": ([(random(ROWS, COLUMNS), decode), (0.5, LORA, 1.0, None, None)], 1),
}


def on_the_fly(*patches):
    # OnTheFly does not keep the layer alive.
    module = GGUFOps.Linear(COLUMNS, ROWS, bias=False)
    module.load_state_dict({"weight": packed()})
    return OnTheFly("key", list(patches), module), module


def by_the_host(*patches, dtype=torch.float32):
    weight = packed().dequantize().to(dtype)
    return comfy.lora.calculate_weight(list(patches), weight, "key", dtype, {"key": [(packed(), None)]})


@pytest.mark.parametrize(("strength", "strength_model"), [(1.0, 1.0), (-0.5, 0.25)])
@pytest.mark.parametrize("name", VALUES)
def test_every_kind_by_tiles_equals_the_hosts_whole_weight(name, strength, strength_model, monkeypatch):
    monkeypatch.setattr(matmul, "TILE_BYTES", 16 * COLUMNS * 4)
    value, multiple = VALUES[name]
    patch = (strength, value, strength_model, None, None)
    function, module = on_the_fly(patch)
    assert function.row_multiple == multiple
    expected = by_the_host(patch)
    assert not torch.equal(expected, packed().dequantize())
    torch.testing.assert_close(function(module.weight.dequantize()), expected, atol=1e-5, rtol=1e-5)
    x, bias = random(5, COLUMNS), random(ROWS)
    actual = matmul.packed_linear(x, module.weight, bias, [function])
    torch.testing.assert_close(actual, linear(x, expected, bias), atol=1e-4, rtol=1e-4)


def test_patches_apply_in_order_and_neighbouring_loras_as_one():
    kinds = ("lora", "lora_without_alpha", "set", "lora", "dora", "oft", "lora")
    patches = [(0.5, VALUES[kind][0], 1.0, None, None) for kind in kinds]
    function, module = on_the_fly(*patches)
    assert len(function._steps) == 6
    assert function.row_multiple == 16
    torch.testing.assert_close(function(module.weight.dequantize()), by_the_host(*patches), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "patch",
    [
        (1.0, adapter("LoRA", UP[:64], DOWN, ALPHA, None, None, None), 1.0, (0, 16, 64), None),
        (1.0, LORA, 1.0, None, lambda diff: -diff),
    ],
    ids=["offset", "function"],
)
def test_what_a_function_or_an_offset_does_is_left_to_the_host(patch):
    function, module = on_the_fly(patch)
    assert function.row_multiple == ROWS
    torch.testing.assert_close(function(module.weight.dequantize()), by_the_host(patch))


@torch.no_grad()
def test_functions_of_others_get_the_whole_weight(monkeypatch):
    monkeypatch.setattr(matmul, "TILE_BYTES", 16 * COLUMNS * 4)
    patch = (1.0, LORA, 1.0, None, None)
    function, module = on_the_fly(patch)
    x = random(5, COLUMNS)
    actual = matmul.packed_linear(x, module.weight, None, [function, lambda weight: weight.flip(0)])
    torch.testing.assert_close(actual, linear(x, by_the_host(patch).flip(0)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["lora", "dora", "lokr", "oft", "diff", "merge_with_lora"])
def test_patches_are_held_on_a_device_until_they_move_back(name):
    function, _ = on_the_fly((1.0, VALUES[name][0], 1.0, None, None))
    meta = torch.device("meta")
    assert function.move_to(meta) == function.size() > 0
    held = [t for step in function._held for t in tensors_of(step)]
    assert {t.device for t in held} == {meta}
    assert function.size() == sum(t.nbytes for t in held)
    assert function.move_to(torch.device("cpu")) == function.size()
    assert function.move_to(torch.device("cpu")) == 0


def test_held_patches_serve_whatever_the_host_calls_the_device(monkeypatch):
    """A tensor on "cpu:0" has the device "cpu" here; on a Mac, one on "mps" has "mps:0"."""
    function, module = on_the_fly((1.0, LORA, 1.0, None, None))
    expected = function(module.weight.dequantize())
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: False)
    function.move_to(torch.device("cpu", 0))
    monkeypatch.setattr(function, "_steps", ())
    assert torch.equal(function(module.weight.dequantize()), expected)


def tensors_of(step):
    found = []
    pending = [step.factors if hasattr(step, "factors") else step.patch[1]]
    while pending:
        value = pending.pop()
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, weight_adapter.WeightAdapterBase):
            pending.append(value.weights)
        elif isinstance(value, tuple | list):
            pending += value
    return found
