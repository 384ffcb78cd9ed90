"""Lean blocks multiply as the layer would: chunks of tokens, and rows of weights in ComfyUI's own formats."""

from __future__ import annotations

import comfy.ops
import comfy.quant_ops
import comfy.sd
import pytest
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.quant_ops import QuantizedTensor
from comfy.weight_adapter import LoRAAdapter

from wanquant.ops.lean import MemoryPlan, apply_lean
from wanquant.ops.lean.weights import RowProjection, projection
from wanquant.ops.loading.diffusion_model import load_diffusion_model
from wanquant.ops.packed.int8 import MIN_TOKENS
from wanquant.ops.packed.matmul import packed_linear
from wanquant.ops.packed.patches import OnTheFly
from wanquant.quant import convert
from wanquant.quant.native.registry import NATIVE
from wanquant.tests.ops.lean.folding import FoldingFFN

comfy_kitchen = pytest.importorskip("comfy_kitchen")
TOKENS, COLUMNS, ROWS = 1500, 512, 256

# format: (layout, arguments of its quantizer)
BY_TOKEN = {
    "int8_tensorwise": ("TensorWiseINT8Layout", {}),
    "int8_tensorwise rows": ("TensorWiseINT8Layout", {"per_channel": True}),
    "int8_tensorwise convrot": ("TensorWiseINT8Layout", {"per_channel": True, "convrot": True}),
    "convrot_w4a4": ("TensorCoreConvRotW4A4Layout", {}),
    "asym_w4a8_int8 g16": ("AsymW4A8Int8Layout", {"group_size": 16}),
    "asym_w4a8_int8 g32": ("AsymW4A8Int8Layout", {"group_size": 32}),
    "asym_w4a8_int8 6 bits": ("AsymW4A8Int8Layout", {"bits": 6}),
}
FLOATS = {
    "float8_e4m3fn": ("TensorCoreFP8E4M3Layout", {"scale": "recalculate"}),
    "float8_e5m2": ("TensorCoreFP8E5M2Layout", {"scale": "recalculate"}),
    "mxfp8": ("TensorCoreMXFP8Layout", {}),
    "nvfp4": ("TensorCoreNVFP4Layout", {}),
}


@pytest.fixture
def layer(monkeypatch):
    """Return the function that builds ComfyUI's Linear with a weight of a format."""

    def build(name, dtype=torch.bfloat16, disabled=(), smooth=False):
        name_of_format, (layout, arguments) = name.split()[0], (BY_TOKEN | FLOATS)[name]
        generator = torch.Generator().manual_seed(0)
        weight = 0.02 * torch.randn(ROWS, COLUMNS, generator=generator).to(dtype)
        try:
            quantized = QuantizedTensor.from_float(weight, layout, **arguments)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            pytest.skip(f"this comfy-kitchen has no {name} ({error})")
        if arguments.get("bits") and quantized._qdata.shape[1] == COLUMNS // 2:
            pytest.skip("this comfy-kitchen has no 6 bits")
        algorithms = {name_of_format: {"quantize_input": False}} | comfy.quant_ops.QUANT_ALGOS
        monkeypatch.setattr(comfy.quant_ops, "QUANT_ALGOS", algorithms)
        monkeypatch.setattr(comfy.ops, "QUANT_ALGOS", algorithms)
        layer = comfy.ops.mixed_precision_ops({}, dtype, disabled=set(disabled)).Linear(COLUMNS, ROWS)
        layer.weight = torch.nn.Parameter(quantized, requires_grad=False)
        layer.bias = torch.nn.Parameter(torch.randn(ROWS, generator=generator).to(dtype), requires_grad=False)
        layer.quant_format, layer.layout_type = name_of_format, layout
        layer._full_precision_mm = name_of_format in disabled
        if smooth:
            if "pre_quant_scale" not in algorithms["nvfp4"]["parameters"]:
                pytest.skip("this host does not know pre_quant_scale")
            layer.pre_quant_scale = torch.nn.Parameter(torch.rand(COLUMNS) + 0.5, requires_grad=False)
        return layer

    return build


def tokens(dtype=torch.bfloat16):
    x = torch.randn(1, TOKENS, COLUMNS, generator=torch.Generator().manual_seed(1))
    x[:, TOKENS // 2 :] *= 3  # A scale of all tokens differs from those of chunks.
    return x.to(dtype)


def chunks(x, size=200):
    return list(x.split(size, 1))


def in_chunks(project, x):
    return torch.cat([project(chunk) for chunk in chunks(x)], 1)


def in_rows(held, x, size=128):
    return torch.cat([in_chunks(held.features(slice(at, at + size)), x) for at in range(0, ROWS, size)], -1)


def error(value, reference):
    return ((value.float() - reference.float()).norm() / reference.float().norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", BY_TOKEN)
@torch.no_grad()
def test_scales_of_single_tokens_make_chunks_bit_equal(name, dtype, layer):
    linear, x = layer(name, dtype), tokens(dtype)
    whole = linear(x)
    assert torch.equal(in_chunks(projection(linear, x), x), whole)
    assert torch.equal(in_rows(RowProjection(linear, x), x), whole)
    dense = torch.nn.functional.linear(x, linear.weight.dequantize(), linear.bias)
    assert not torch.equal(whole, dense), "the layer quantizes its input"


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("name", FLOATS)
@torch.no_grad()
def test_emulated_formats_are_dequantized_once(name, smooth, layer, monkeypatch):
    linear, x = layer(name, disabled=[name], smooth=smooth), tokens()
    whole, count, dequantize = linear(x), [], QuantizedTensor.dequantize
    monkeypatch.setattr(QuantizedTensor, "dequantize", lambda self: (count.append(1), dequantize(self))[1])
    assert error(in_chunks(projection(linear, x), x), whole) < 2e-3
    assert error(in_rows(RowProjection(linear, x), x), whole) < 2e-3
    assert len(count) == 2


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("name", FLOATS)
@torch.no_grad()
def test_native_formats_quantize_chunks_as_all_tokens(name, smooth, layer, monkeypatch):
    """A GPU has its own products; here the quantized input is dequantized and multiplied."""

    def no_kernel(*_, **__):
        raise RuntimeError("not on a CPU")

    for product in ("scaled_mm_mxfp8", "scaled_mm_nvfp4"):
        monkeypatch.setattr(comfy_kitchen, product, no_kernel, raising=False)
    linear, x = layer(name, smooth=smooth), tokens()
    whole = linear(x)
    exact = layer(name, disabled=[name], smooth=smooth)(x)
    assert error(whole, exact) > 0.01, "the layer quantizes its input"
    assert error(in_chunks(projection(linear, x, lambda: chunks(x)), x), whole) < 2e-3
    assert error(in_rows(RowProjection(linear, x, lambda: chunks(x)), x), whole) < 2e-3


@torch.no_grad()
def test_a_scale_that_cannot_be_measured(layer):
    """A chunk's own scale would give another result than that of all tokens."""
    linear, x = layer("nvfp4"), tokens()
    exact = layer("nvfp4", disabled=["nvfp4"])(x)
    assert error(in_chunks(linear, x), linear(x)) > 0.01
    assert error(in_chunks(projection(linear, x), x), exact) < 2e-3
    linear.input_scale = torch.nn.Parameter(x.abs().amax().float() / 2688, requires_grad=False)
    assert error(in_chunks(projection(linear, x), x), linear(x)) < 2e-3


@torch.no_grad()
def test_patches_are_applied_as_the_layer_applies_them(layer):
    linear, x = layer("int8_tensorwise convrot"), tokens()
    linear.weight_function = [lambda weight: weight * 2]
    whole = linear(x)
    assert error(in_chunks(projection(linear, x), x), whole) < 2e-3
    assert error(in_rows(RowProjection(linear, x), x), whole) < 2e-3


@torch.no_grad()
def test_layers_do_not_change(layer):
    linear, x = layer("int8_tensorwise convrot"), tokens()
    before = dict(vars(linear))
    projection(linear, x)(x)
    RowProjection(linear, x).features(slice(0, 128))(x)
    assert vars(linear) == before and linear.weight.shape == (ROWS, COLUMNS)


@pytest.fixture(scope="module")
def packed(t2v):
    """Return a Linear of a GGUF model with int8 on."""
    pytest.importorskip("comfy_kitchen.tensor.int8", reason="this ComfyUI has no INT8 arithmetic")
    return load_diffusion_model(t2v[1], dtype=torch.bfloat16, precision="int8").model.diffusion_model.blocks[0].ffn[0]


@pytest.mark.parametrize("patched", [False, True])
@torch.no_grad()
def test_packed_weights_in_int8_look_at_all_tokens(patched, packed, monkeypatch):
    columns, rows = packed.in_features, packed.out_features
    x = torch.randn(1, MIN_TOKENS, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    if patched:
        up, down = torch.randn(rows, 8) / 50, torch.randn(8, columns) / 50
        lora = LoRAAdapter(set(), (up, down, None, None, None, None))
        function = OnTheFly("ffn.0", [(1.0, lora, 1.0, None, None)], packed)
        monkeypatch.setattr(packed, "weight_function", [function])
    whole = packed(x)
    for held in (projection(packed, x), RowProjection(packed, x).features(slice(0, rows))):
        assert torch.equal(torch.cat([held(chunk) for chunk in x.split(100, 1)], 1), whole)
    held = RowProjection(packed, x)
    parts = [held.features(slice(at, at + 64))(x) for at in range(0, rows, 64)]
    assert torch.equal(torch.cat(parts, -1), whole)
    few = x[:, : MIN_TOKENS - 1]
    exact = packed_linear(few, packed.weight, packed.bias.bfloat16(), packed.weight_function)
    assert error(projection(packed, few)(few), exact) < 2e-3 < error(projection(packed, x)(few), exact)


class Attention:
    """Attention in float64: its result in bfloat16 does not depend on how the queries and heads are cut."""

    accepts_query_chunks = True

    def __call__(self, _, q, k, v, heads, **options):
        options.pop("transformer_options", None)
        return attention_pytorch(q.double(), k.double(), v.double(), heads, **options).to(q.dtype)


@pytest.mark.parametrize(("recipe", "folds"), [("INT8", False), ("INT8", True), ("INT4", False)])
@torch.no_grad()
def test_a_lean_forward_equals_the_whole_bit_for_bit(recipe, folds, t2v, tmp_path, lean_blocks, monkeypatch):
    if NATIVE[recipe].config["format"] not in comfy.quant_ops.QUANT_ALGOS:
        pytest.skip(f"this host does not know {recipe}")
    path = convert(t2v[0], tmp_path / "a.safetensors", recipe).path
    model = comfy.sd.load_diffusion_model(str(path), {"dtype": torch.bfloat16})
    model.patch_model(torch.device("cpu"))
    if folds:
        if not hasattr(comfy.ops, "linear_input_act"):
            pytest.skip("this host applies activations by themselves")
        for block in model.model.diffusion_model.blocks:
            block.ffn.__class__ = FoldingFFN
        folded = comfy.ops.linear_input_act  # on a GPU its bits differ from those of the layers in turn
        monkeypatch.setattr(comfy.ops, "linear_input_act", lambda *args: 2 * folded(*args))
    generator = torch.Generator().manual_seed(0)
    x, text = (torch.randn(shape, generator=generator) for shape in ((1, 16, 3, 16, 16), (1, 7, 4096)))

    def run(patcher):
        options = {"wrappers": patcher.wrappers, "optimized_attention_override": Attention()}
        return model.model.apply_model(x, torch.tensor([0.5]), c_crossattn=text, transformer_options=options)

    whole = run(model)
    assert torch.equal(run(apply_lean(model, MemoryPlan(2, 40))), whole)
    assert len(lean_blocks) == 2
    # The norm of recomputed keys is applied in other steps, so that a later input may round to another level.
    assert error(run(apply_lean(model, MemoryPlan(2, 40, 1))), whole) < 0.03
