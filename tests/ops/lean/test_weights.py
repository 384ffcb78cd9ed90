"""Weights of lean blocks: packed or dense, patched, dequantized once, and not overwritten as ComfyUI reuses buffers."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import comfy.ops
import comfy.sd
import pytest
import torch
from safetensors.torch import load_file

from wanquant.ops.lean import MemoryPlan, apply_lean
from wanquant.ops.lean.weights import RowProjection, projection
from wanquant.ops.loading.diffusion_model import load_diffusion_model
from wanquant.ops.packed import matmul
from wanquant.ops.packed.linear import packed_modules
from wanquant.quant.conversion.convert import convert
from wanquant.tests.ops.lean.test_blocks import build, error, forward

CPU = torch.device("cpu")
PLAN = MemoryPlan(2, 16, 1)


@pytest.fixture(scope="module")
def source(tiny_wan, tmp_path_factory):
    path = tmp_path_factory.mktemp("low_vram") / "tiny.safetensors"
    return tiny_wan["write_tiny_wan"](path, layers=1, ffn_dim=512)


def load(path, loras=(), dtype=torch.float32, memory=1 << 40):
    patcher = load_diffusion_model(path, dtype=dtype)
    for tensors in loras:
        patcher, _ = comfy.sd.load_lora_for_models(patcher, None, tensors, 0.8, 0)
    patcher.patch_model(CPU, load_weights=False)
    patcher.partially_load(CPU, memory)
    return patcher


def lora(source, **extra):
    generator, tensors = torch.Generator().manual_seed(3), {}
    for name, weight in load_file(source).items():
        if name.startswith("blocks.") and name.endswith((".k.weight", ".v.weight", ".o.weight", "ffn.2.weight")):
            stem = "diffusion_model." + name.removesuffix(".weight")
            tensors[f"{stem}.lora_A.weight"] = torch.randn(4, weight.shape[1], generator=generator) / 8
            tensors[f"{stem}.lora_B.weight"] = torch.randn(weight.shape[0], 4, generator=generator) / 8
            tensors |= {f"{stem}.{suffix}": make(weight) for suffix, make in extra.items()}
    return tensors


@pytest.mark.parametrize("recipe", ["Q4_K_M", "Q8_0", "IQ4_XS"])
def test_packed(recipe, source, tmp_path):
    model = load(convert(source, tmp_path / "a.gguf", recipe, effort="fast").path)
    assert error(forward(apply_lean(model, PLAN)), forward(model)) < 1e-5


@pytest.mark.parametrize("memory", [1 << 40, 1], ids=["resident", "offloaded"])
@pytest.mark.parametrize("extra", [{}, {"dora_scale": lambda w: torch.rand(w.shape[0], 1) + 0.5}], ids=["lora", "dora"])
def test_packed_with_loras(extra, memory, source, tmp_path):
    path = convert(source, tmp_path / "a.gguf", "Q4_K_M", effort="fast").path
    base = forward(load(path))
    model = load(path, [lora(source, **extra), lora(source)], memory=memory)
    expected = forward(model)
    assert error(expected, base) > 1e-3
    assert error(forward(apply_lean(model, PLAN)), expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_dense_weights_of_the_host(dtype):
    model = build(dtype=dtype)
    assert error(forward(apply_lean(model, PLAN)), forward(model)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_within_rounding(dtype):
    """The error against float32 is about that of ComfyUI's own forward."""
    exact = forward(build())
    model = build(dtype=dtype)
    stock = forward(model, dtype=dtype).float()
    lean = forward(apply_lean(model, PLAN), dtype=dtype).float()
    assert error(lean, exact) < 1.2 * error(stock, exact)


def test_one_time_step_per_frame():
    """The 5B model has them with a denoise mask."""
    model = build("5B")
    steps = torch.tensor([[0.0, 500.0]])
    expected = forward(model, "5B", timestep=steps)
    assert error(expected, forward(model, "5B")) > 1e-3
    assert error(forward(apply_lean(model, MemoryPlan(2, 7, 1)), "5B", timestep=steps), expected) < 1e-5


def test_each_weight_is_dequantized_once_per_block(source, tmp_path, monkeypatch):
    model = load(convert(source, tmp_path / "a.gguf", "Q8_0", effort="fast").path)
    layers = {m.weight._qdata.data_ptr(): (key, len(m.weight)) for key, m in packed_modules(model.model)}
    rows, dequantize = Counter(), matmul.dequantize_into

    def count(packed, qtype, out):
        rows[layers[max(start for start in layers if start <= packed.data_ptr())]] += len(packed)
        dequantize(packed, qtype, out)

    monkeypatch.setattr(matmul, "dequantize_into", count)
    forward(apply_lean(model, PLAN))
    keys = "diffusion_model.blocks.0.self_attn.k.weight"
    repeated = {key: count - all_rows for (key, all_rows), count in rows.items() if count != all_rows}
    assert repeated == {keys: 128}, "one of the two groups of heads"


class SharedBuffer:
    """A stand-in for ComfyUI's cast, which casts and patches all weights of a copy stream in the same buffer."""

    def __init__(self):
        self.buffer = torch.empty(8, 8)

    def __call__(self, module, like, **_):
        self.buffer.copy_(module.weight)
        for function in module.weight_function:
            function(self.buffer)
        return self.buffer, None, (object(), self.buffer, None)


def layers(dtype=torch.float32):
    """Yield two Linears whose rows have the sums 8 and 16."""
    for value in (1.0, 2.0):
        layer = comfy.ops.manual_cast.Linear(8, 8, bias=False)
        layer.weight = torch.nn.Parameter(torch.full((8, 8), value, dtype=dtype), requires_grad=False)
        yield layer


@pytest.mark.parametrize("functions", [[], [lambda weight: weight.mul_(2)]], ids=["plain", "patched"])
@pytest.mark.parametrize("rows", [False, True])
def test_held_weights_survive_the_next_cast(rows, functions, monkeypatch):
    cast, like = SharedBuffer(), torch.ones(1, 8)
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", cast)
    monkeypatch.setattr(comfy.ops, "uncast_bias_weight", lambda *_: None)
    held = []
    for layer in layers():
        layer.weight_function = functions
        held.append(RowProjection(layer, like).features(slice(0, 8)) if rows else projection(layer, like))
    assert [project(like)[0, 0].item() / (1 + len(functions)) for project in held] == [8.0, 16.0]


@pytest.mark.parametrize("stored", [torch.float32, torch.float16], ids=str)
def test_pages_of_dynamic_vram_are_not_held(stored, monkeypatch):
    """ComfyUI unmaps a page once it is unpinned. It has the dtype of the model, not that of the file."""
    page, layer = torch.ones(8, 8), next(layers(stored))
    layer._v, layer.weight._model_dtype = SimpleNamespace(), torch.float32
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", lambda *_, **__: (page, None, (None, CPU, None)))
    monkeypatch.setattr(comfy.ops, "uncast_bias_weight", lambda *_: page.zero_())
    assert projection(layer, torch.ones(1, 8))(torch.ones(1, 8))[0, 0] == 8
