"""Products in 8-bit integers: their error, and when `packed_linear` is used instead."""

from __future__ import annotations

import logging

import pytest
import torch
from comfy.weight_adapter import LoRAAdapter

from wanquant.ops import host, host_products
from wanquant.ops.loading.diffusion_model import load_diffusion_model
from wanquant.ops.packed import int8
from wanquant.ops.packed.int8 import (
    MIN_TOKENS,
    WORTHWHILE_TOKENS,
    AutoOps,
    Int8Ops,
    hold_where_faster,
    int8_linear,
    int8_rows,
    patched_int8_rows,
)
from wanquant.ops.packed.layout import pack
from wanquant.ops.packed.linear import GGUFOps
from wanquant.ops.packed.matmul import PatchedRows, packed_linear
from wanquant.ops.packed.patches import OnTheFly
from wanquant.ops.packed.precision import packed_ops
from wanquant.quant import QTYPES, QuantError
from wanquant.quant.native.rotation import rotate

pytest.importorskip("comfy_kitchen.tensor.int8", reason="this ComfyUI has no INT8 arithmetic")


def weight_and_input(name="Q8_0", tokens=MIN_TOKENS, columns=2048, outliers=True):
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(96, columns, generator=generator)
    x = torch.randn(tokens, columns, generator=generator)
    if outliers:
        x[:, torch.randperm(columns, generator=generator)[:16]] *= 10
    packed = QTYPES[name].quantize(weight, effort="fast")
    return weight, pack(packed, name, tuple(weight.shape), torch.bfloat16), x.bfloat16()


@pytest.mark.parametrize(("name", "more"), [("Q8_0", 0.013), ("Q6_K", 0.006), ("Q4_K", 0.003), ("Q4_0", 0.003)])
def test_error_beside_that_of_the_weight(name, more):
    weight, packed, x = weight_and_input(name)
    exact = x.float() @ weight.t()

    def error(linear):
        return ((linear(x, packed, None).float() - exact).norm() / exact.norm()).item()

    bfloat16, int8 = error(packed_linear), error(int8_linear)
    print(f"{name}: {bfloat16:.2%} in bfloat16, {int8:.2%} in int8")  # noqa: T201
    assert bfloat16 < int8 < bfloat16 + more


@pytest.mark.parametrize(("tokens", "columns"), [(MIN_TOKENS - 1, 2048), (MIN_TOKENS, 96)], ids=["few", "odd"])
def test_stands_aside_where_it_cannot_pay(tokens, columns):
    _, packed, x = weight_and_input(tokens=tokens, columns=columns, outliers=False)
    assert torch.equal(int8_linear(x, packed, None), packed_linear(x, packed, None))


@torch.no_grad()
def test_bias_and_weight_functions_count():
    _, packed, x = weight_and_input()
    bias = torch.randn(96).bfloat16()
    actual = int8_linear(x, packed, bias, [lambda w: w * 2])
    expected = packed_linear(x, packed, bias, [lambda w: w * 2])
    assert (actual - expected).norm() / expected.norm() < 0.02


@torch.no_grad()
def test_a_patch_is_added_to_tiles_before_the_rotation(monkeypatch):
    """Rows with a patch are those of the patched weight, in whatever tiles; without one they come from the blocks."""
    _, packed, x = weight_and_input("Q4_K")
    dense = QTYPES["Q4_K"].dequantize(packed._qdata, torch.bfloat16)
    blocks = int8_rows(packed, (), x)
    plain = int8_rows(packed, (lambda w: w,), x)
    patched = int8_rows(packed, (lambda w: w + 1,), x)
    expected = int8_rows(pack((dense + 1).view(torch.uint8), "BF16", tuple(dense.shape), torch.bfloat16), (), x)
    assert all(torch.equal(a, b) for a, b in zip(patched, expected, strict=True))
    assert 0 < (blocks[0] != plain[0]).float().mean() < 0.2, "rounding to bfloat16 first moves few codes"
    assert (blocks[0].int() - plain[0].int()).abs().max() == 1


def lora_of(packed, rank=8):
    """Return a LoRA of a packed weight as its layer's function, the layer, and its product, float32."""
    generator = torch.Generator().manual_seed(2)
    up, down = (
        torch.randn(shape, generator=generator) / 32 for shape in ((len(packed), rank), (rank, packed.shape[1]))
    )
    layer = torch.nn.Module()
    layer.weight = packed
    adapter = LoRAAdapter(set(), (up, down, None, None, None, None))
    return OnTheFly("key", [(0.5, adapter, 1.0, None, None)], layer), layer, 0.5 * up @ down


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K"])
def test_a_lora_is_added_to_rotated_rows_with_no_larger_error(name, monkeypatch):
    _, packed, x = weight_and_input(name)
    function, _, product = lora_of(packed)
    wanted = QTYPES[name].dequantize(packed._qdata) + product

    def error(codes, scales):
        return float((rotate(codes.float() * scales) - wanted).norm() / wanted.norm())

    monkeypatch.setattr(int8, "dequantized_tiles", None)  # no row is dequantized
    found = int8_rows(packed, (function,), x)
    assert error(*found) < 1.001 * error(
        *int8_rows(pack(wanted.view(torch.uint8), "F32", packed.shape, x.dtype), (), x)
    )
    monkeypatch.setattr(int8, "CHANGE_BYTES", 1)
    in_parts = int8_rows(packed, (function,), x)
    some = patched_int8_rows(PatchedRows(packed, (function,), x), slice(32, 64), x)
    for codes, scales in (in_parts, (torch.cat([found[0][:32], some[0], found[0][64:]]), found[1])):
        assert torch.allclose(scales, found[1], rtol=1e-2)
        assert (codes.int() - found[0].int()).abs().max() <= 1


def test_other_patches_beside_a_lora_change_tiles():
    _, packed, x = weight_and_input()
    function, _, product = lora_of(packed)
    codes, scales = int8_rows(packed, (function, lambda w: w + 1), x)
    wanted = QTYPES["Q8_0"].dequantize(packed._qdata) + product + 1
    assert (rotate(codes.float() * scales) - wanted).norm() / wanted.norm() < 0.01


def test_loader_takes_it_along(t2v, sqnr):
    patchers = [
        load_diffusion_model(t2v[1], dtype=torch.float32, precision=precision) for precision in ("exact", "int8")
    ]
    load, arguments = patchers[1].cached_patcher_init
    patchers.append(load(*arguments))
    x, text = torch.randn(1, 16, 4, 32, 32), torch.randn(1, 7, 4096)
    with torch.no_grad():
        full, *others = (
            p.patch_model(torch.device("cpu"), 0).diffusion_model(x, torch.ones(1), text) for p in patchers
        )
    assert 25 < sqnr(full, others[0]) < 60
    assert torch.equal(*others)


def test_a_host_without_it(monkeypatch: pytest.MonkeyPatch, t2v):
    monkeypatch.setattr(host, "comfy_kitchen", None)
    with pytest.raises(QuantError, match=r"update it to 0\.27"):
        load_diffusion_model(t2v[1], precision="int8")


def test_training_needs_the_weight():
    _, packed, x = weight_and_input()
    x.requires_grad_()
    int8_linear(x, packed, None).sum().backward()
    assert torch.equal(x.grad[0], QTYPES["Q8_0"].dequantize(packed._qdata, torch.bfloat16).sum(0))


@pytest.mark.parametrize("fast", [False, True])
def test_auto_asks_for_a_fast_backend(fast, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    if fast:
        monkeypatch.setattr(host_products, "int8_backend", lambda device: "cuda")
    assert packed_ops("auto") is (AutoOps if fast else GGUFOps)
    (message,) = [record.getMessage() for record in caplog.records]
    assert ("int8 by comfy-kitchen's cuda backend" if fast else "exact, because comfy-kitchen has no") in message


@pytest.mark.parametrize(
    ("cuda", "capability", "expected"),
    [("13.0", (8, 9), AutoOps), ("13.0", (9, 0), GGUFOps), (None, (9, 0), AutoOps)],
    ids=["GeForce", "H100", "AMD"],
)
def test_auto_is_exact_where_16_bits_are_as_fast(cuda, capability, expected, monkeypatch, caplog):
    """Mocks stand for the cards."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(host_products, "int8_backend", lambda device: "cuda")
    monkeypatch.setattr("comfy.model_management.get_torch_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert packed_ops("auto") is expected
    assert ("hardly faster on this GPU" in caplog.text) == (expected is GGUFOps)


def test_the_eager_backend_counts_as_none(monkeypatch, caplog):
    registry = pytest.importorskip("comfy_kitchen.registry").registry
    device = torch.device("cpu")
    assert host_products.int8_backend(device) == ""
    monkeypatch.setattr(type(registry), "get_capable_backend", lambda self, name, kwargs: "triton")
    assert host_products.int8_backend(device) == "triton"
    assert packed_ops("int8") is Int8Ops and not caplog.records
    monkeypatch.undo()
    assert packed_ops("int8") is Int8Ops and "choose auto" in caplog.text


def test_auto_in_a_host_without_it(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(host, "comfy_kitchen", None)
    assert packed_ops("auto") is GGUFOps
    assert "this ComfyUI has no int8" in caplog.text


def test_auto_is_exact_in_short_videos():
    _, packed, x = weight_and_input(tokens=WORTHWHILE_TOKENS, columns=256)
    int8, exact = (multiply(x, packed, None) for multiply in (AutoOps.Linear.multiply, packed_linear))
    assert torch.equal(int8, int8_linear(x, packed, None)) and not torch.equal(int8, exact)
    few = x[:-1]
    assert torch.equal(AutoOps.Linear.multiply(few, packed, None), packed_linear(few, packed, None))


def test_auto_is_exact_where_few_rows_would_quantize_the_input_again():
    _, packed, x = weight_and_input(tokens=WORTHWHILE_TOKENS, columns=256)
    patched, rows = PatchedRows(packed, (), x), len(packed)

    def product(part):
        return hold_where_faster(patched, part, x, len(x))(x, None)

    assert torch.equal(product(slice(0, rows)), int8_linear(x, packed, None))
    half = slice(0, rows // 2)
    assert torch.equal(product(half), packed_linear(x, packed, None)[..., half])


@pytest.mark.parametrize("columns", [8, 1024, 2304])
def test_products_of_the_tests_are_those_of_integers(columns):
    """Test also the largest sums, which float32 would round; see `quick_int8_products`."""
    codes = [torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((32, columns), (16, columns))]
    for each in codes:
        each[0] = -128
    expected = codes[0].long() @ codes[1].T.long()
    found = torch._int_mm(codes[0], codes[1].T)
    assert found.dtype == torch.int32 and torch.equal(found.long(), expected)
