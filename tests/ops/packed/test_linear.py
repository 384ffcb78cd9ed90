"""Linear and Embedding on packed weights, outside of a model."""

from __future__ import annotations

import comfy.model_management
import comfy.ops
import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from wanquant.ops import host
from wanquant.ops.lean.weights import projection
from wanquant.ops.packed.layout import is_packed, pack
from wanquant.ops.packed.linear import GGUFOps, computing_in, packed_modules
from wanquant.quant import QTYPES, QuantError
from wanquant.tests import newer_host

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS, COLUMNS = 24, 512


def packed_weight(name, dtype=torch.float32, rows=ROWS):
    qtype = QTYPES[name]
    blocks = torch.randint(0, 256, (rows * COLUMNS // qtype.block_size, qtype.type_size), dtype=torch.uint8)
    if name in SCALES:
        blocks[:, SCALES[name]] = (
            torch.tensor([0.01], dtype=torch.float16).view(torch.uint8).repeat(len(SCALES[name]) // 2)
        )
    return pack(blocks.view(rows, -1), name, (rows, COLUMNS), dtype)


# The bytes of each block that hold float16 scales, since random bytes could be infinite there.
SCALES = {
    "Q8_0": [0, 1],
    "Q4_0": [0, 1],
    "Q5_1": [0, 1, 2, 3],
    "Q4_K": [0, 1, 2, 3],
    "Q6_K": [208, 209],
    "IQ4_XS": [0, 1],
    "IQ2_XXS": [0, 1],
}


def linear(weight, bias=None):
    module = GGUFOps.Linear(COLUMNS, ROWS, bias=bias is not None, dtype=weight.dtype)
    state = {"weight": weight} | ({"bias": bias} if bias is not None else {})
    module.load_state_dict(state)
    return module


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCALES)
def test_equals_linear_on_the_decoded_weight(name, dtype):
    weight, bias = packed_weight(name, dtype), torch.randn(ROWS)
    x = torch.randn(2, 5, COLUMNS, dtype=dtype)
    expected = torch.nn.functional.linear(x, QTYPES[name].dequantize(weight._qdata, dtype), bias.to(dtype))
    assert torch.equal(linear(weight, bias)(x), expected)


def test_input_dtype_decides_not_the_stored_one():
    weight = packed_weight("Q8_0", torch.bfloat16)
    x = torch.randn(3, COLUMNS)
    expected = torch.nn.functional.linear(x, QTYPES["Q8_0"].dequantize(weight._qdata))
    assert torch.equal(linear(weight)(x), expected)


def test_size_is_the_packed_size():
    module = linear(packed_weight("Q4_0"), torch.zeros(ROWS))
    assert comfy.model_management.module_size(module) == ROWS * COLUMNS // 32 * 18 + ROWS * 4


def test_nothing_is_allocated_before_loading_and_nothing_copied_by_it():
    module = GGUFOps.Linear(1 << 20, 1 << 20)
    assert list(module.parameters()) == []
    weight = packed_weight("Q4_0")
    assert linear(weight).weight._qdata.data_ptr() == weight._qdata.data_ptr()


def test_blocks_that_return_to_main_memory_are_those_that_were_loaded():
    """Use the meta device as an accelerator: tensors that return from it have no values, so they must not be used."""
    weight = packed_weight("Q4_0")
    module = linear(weight)
    expected = weight._qdata.clone()
    for _ in range(2):
        assert module.to("meta").weight.device.type == "meta"
        assert len(list(module.parameters())) == 1
        module._apply(lambda t: torch.zeros_like(t, device="cpu") if t.is_meta else t)
        assert module.weight._qdata.data_ptr() == weight._qdata.data_ptr()
    assert torch.equal(module.weight._qdata, expected)


def test_plain_weights_are_accepted():
    weight = torch.randn(ROWS, COLUMNS, dtype=torch.bfloat16)
    module, x = linear(weight), torch.randn(3, COLUMNS)
    assert torch.equal(module(x), torch.nn.functional.linear(x, weight.float()))
    assert list(packed_modules(module)) == []


def test_missing_unexpected_and_misshapen_keys_are_reported():
    module = torch.nn.Sequential(GGUFOps.Linear(COLUMNS, ROWS))
    result = module.load_state_dict({"0.bias": torch.ones(ROWS), "0.scale_weight": torch.ones(1)}, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["0.weight"], ["0.scale_weight"])
    assert torch.equal(module(torch.ones(1, COLUMNS)), torch.ones(1, ROWS))
    with pytest.raises(RuntimeError, match=r"0\.weight: shape \(12, 512\) in the file, \(24, 512\) in the model"):
        module.load_state_dict({"0.weight": packed_weight("Q4_0", rows=12)}, strict=False)


@torch.no_grad()
def test_weight_functions_get_a_private_decoded_weight():
    module = linear(packed_weight("Q8_0"))
    x = torch.randn(3, COLUMNS)
    base = module(x)
    module.weight_function = [lambda weight: weight.mul_(2)]
    assert torch.equal(module(x), 2 * base)
    module.weight_function = []
    assert torch.equal(module(x), base)


@pytest.mark.parametrize("use", ["forward", "projection"])
def test_the_host_gets_its_weight_back_when_memory_runs_out(use, monkeypatch):
    """A handle that is kept would keep the weight's page of video memory pinned."""
    module, x, returned = linear(packed_weight("Q8_0")), torch.randn(3, COLUMNS), []
    monkeypatch.setattr(comfy.ops, "uncast_bias_weight", lambda *cast: returned.append(cast[0]))

    def fail(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("wanquant.ops.packed.matmul.dequantize_into", fail)
    with pytest.raises(torch.OutOfMemoryError):
        module(x) if use == "forward" else projection(module, x)
    assert returned == [module]


def test_moving_and_casting_the_module_keeps_blocks():
    module = linear(packed_weight("Q8_0"), torch.zeros(ROWS))
    blocks = module.weight._qdata.clone()
    module.to("cpu", torch.float16)
    assert is_packed(module.weight)
    assert (module.weight.dtype, module.bias.dtype) == (torch.float16, torch.float16)
    assert torch.equal(module.weight._qdata, blocks)


def test_is_what_the_hosts_bypass_lora_looks_for():
    assert isinstance(GGUFOps.Linear(1, 1), torch.nn.Linear)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["Q8_0", "Q4_K"])
def test_embedding_gathers_rows(name, dtype, monkeypatch):
    weight = packed_weight(name)
    module = GGUFOps.Embedding(ROWS, COLUMNS)
    module.load_state_dict({"weight": weight})
    ids = torch.tensor([[3, 0, 3], [23, 7, 1]])
    decoded = []
    monkeypatch.setattr(type(QTYPES[name]), "dequantize", spy(type(QTYPES[name]).dequantize, decoded))
    rows = module(ids, out_dtype=dtype)
    assert rows.dtype == dtype
    assert [packed.shape[:-1] for packed in decoded] == [ids.shape], "only the rows asked for are decoded"
    assert torch.equal(rows, weight.dequantize()[ids].to(dtype))


def spy(method, seen):
    def wrapped(self, packed, *args):
        seen.append(packed)
        return method(self, packed, *args)

    return wrapped


def test_embedding_takes_plain_tables_and_patches():
    table = torch.randn(ROWS, COLUMNS, dtype=torch.float16)
    ids = torch.tensor([5, 2])
    plain = GGUFOps.Embedding(ROWS, COLUMNS)
    plain.load_state_dict({"weight": table})
    assert torch.equal(plain(ids, out_dtype=torch.float32), table[ids].float())
    patched = GGUFOps.Embedding(ROWS, COLUMNS)
    patched.load_state_dict({"weight": packed_weight("Q8_0")})
    before = patched(ids)
    patched.weight_function = [lambda weight: weight.add_(1)]
    assert torch.equal(patched(ids), before + 1)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "IQ2_XXS"])
def test_compiles_once_for_all_layers_of_a_shape(name):
    """Compile to one graph, which dequantizes in one operation and does not cast or copy the weight otherwise."""
    graphs = []

    def compiler(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    compiled = torch.compile(lambda layer, x: layer(x), fullgraph=True, backend=aot_autograd(fw_compiler=compiler))
    x = torch.randn(3, COLUMNS, dtype=torch.bfloat16)
    for _ in range(3):
        layer = linear(packed_weight(name, torch.bfloat16), torch.randn(ROWS, dtype=torch.bfloat16))
        with torch.inference_mode():
            torch.testing.assert_close(compiled(layer, x), layer(x), rtol=0, atol=0, equal_nan=True)
    assert graphs == [
        ["wanquant.dequantize.default", "aten.view.default", "aten.t.default", "aten.addmm.default"],
    ]


@pytest.fixture
def eager(monkeypatch):
    """Return the host's activations, also for hosts that are too old to pass them to a Linear."""
    if not hasattr(comfy.ops, "_eager_input_act"):
        monkeypatch.setattr(comfy.ops, "_eager_input_act", newer_host.eager, raising=False)


def norm(columns):
    module = comfy.ops.manual_cast.RMSNorm(columns, eps=1e-5, dtype=torch.float32)
    module.load_state_dict({"weight": torch.linspace(0.5, 1.5, columns)})
    return module


CALLS = {
    "gelu": (COLUMNS, lambda: {"input_act": "gelu_tanh"}, lambda x, _: F.gelu(x, approximate="tanh")),
    "swiglu": (2 * COLUMNS, lambda: {"input_act": "swiglu"}, lambda x, _: F.silu(x[..., :COLUMNS]) * x[..., COLUMNS:]),
    "norm": (
        COLUMNS,
        lambda: {"input_act": "rms_norm", "act_weight": norm(COLUMNS)},
        lambda x, given: given["act_weight"](x),
    ),
    "norm of a tensor": (
        COLUMNS,
        lambda: {"input_act": "rms_norm", "act_weight": torch.linspace(0, 2, COLUMNS), "act_eps": 1e-2},
        lambda x, given: F.rms_norm(x, (COLUMNS,), given["act_weight"], 1e-2),
    ),
    "nothing": (COLUMNS, lambda: {"input_act": None, "act_weight": None, "residual": None}, lambda x, _: x),
}


@pytest.mark.parametrize("scaled", [None, False, True], ids=["alone", "residual", "scaled residual"])
@pytest.mark.parametrize("call", CALLS)
def test_takes_what_newer_hosts_fold_with_the_product(call, scaled, eager):
    columns, keywords, activated = CALLS[call]
    module, x, given = linear(packed_weight("Q4_K"), torch.randn(ROWS)), torch.randn(2, 5, columns), keywords()
    expected = module(activated(x, given))
    if scaled is not None:
        given["residual"] = residual = torch.randn(2, 5, ROWS)
        scale = given["residual_scale"] = torch.randn(ROWS) if scaled else None
        expected = residual + expected * (1 if scale is None else scale)
    torch.testing.assert_close(module.forward_comfy_cast_weights(x, **given), expected)


def test_activation_and_residual_keep_the_callers_dtype(eager):
    """Test a layer that only computes the product in 16 bits, as in a text encoder."""
    module = computing_in(torch.bfloat16).Linear(COLUMNS, ROWS, bias=False, dtype=torch.float32)
    module.load_state_dict({"weight": packed_weight("Q8_0")})
    x, residual = torch.randn(2, 5, COLUMNS), 1000 + torch.randn(2, 5, ROWS)
    expected = residual + module(F.gelu(x, approximate="tanh"))
    out = module.forward_comfy_cast_weights(x, input_act="gelu_tanh", residual=residual)
    assert out.dtype == torch.float32
    assert torch.equal(out, expected)


def test_what_it_does_not_know_is_refused_with_the_hosts_version(monkeypatch):
    monkeypatch.setattr(host, "host_version", lambda: "9.9.0")
    module, table = linear(packed_weight("Q8_0")), GGUFOps.Embedding(ROWS, COLUMNS, dtype=torch.float32)
    table.load_state_dict({"weight": packed_weight("Q8_0")})
    x, index = torch.randn(3, COLUMNS), torch.tensor([1])
    assert torch.equal(module.forward_comfy_cast_weights(x, act_up=None), module(x))
    with pytest.raises(QuantError, match=r"ComfyUI 9\.9\.0 passes act_up to a layer, .*; update WanQuant"):
        module.forward_comfy_cast_weights(x, act_up=x)
    with pytest.raises(QuantError, match=r"ComfyUI 9\.9\.0 passes .* to a layer"):
        table.forward_comfy_cast_weights(index, scale=x)
    if not hasattr(comfy.ops, "_eager_input_act"):
        with pytest.raises(QuantError, match="passes the activation 'relu' to a layer"):
            module.forward_comfy_cast_weights(x, input_act="relu")


def test_rows_of_a_table_that_is_not_resident():
    """Newer hosts call another method, whose version in the host would dequantize the whole table."""
    weight, index = packed_weight("Q8_0"), torch.tensor([[3, 1]])
    table = GGUFOps.Embedding(ROWS, COLUMNS, dtype=torch.float32)
    table.load_state_dict({"weight": weight})
    assert torch.equal(table.host_rows(index, torch.float32), weight.dequantize()[index])
