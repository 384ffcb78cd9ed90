"""The product with a packed weight, tile by tile."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from wanquant.ops.packed import matmul
from wanquant.ops.packed.layout import pack
from wanquant.quant import QTYPES

ROWS, COLUMNS = 70, 512


def weight(name="Q6_K", rows=ROWS, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    packed = QTYPES[name].quantize(torch.randn(rows, COLUMNS, generator=generator), effort="fast")
    return pack(packed, name, (rows, COLUMNS), dtype)


def expected(x, packed, bias):
    return linear(x, QTYPES[packed.params.qtype].dequantize(packed._qdata, x.dtype), bias)


@pytest.mark.parametrize("rows_a_tile", [1, 16, 33, 64, 70, 1000])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tiles_do_not_show(rows_a_tile, with_bias, dtype, monkeypatch):
    monkeypatch.setattr(matmul, "TILE_BYTES", rows_a_tile * COLUMNS * dtype.itemsize)
    for shape in ((2, 5, COLUMNS), (COLUMNS,), (0, COLUMNS), (1, COLUMNS)):
        x, bias = torch.randn(shape, dtype=dtype), torch.randn(ROWS, dtype=dtype) if with_bias else None
        atol = 1e-4 + 64 * torch.finfo(dtype).eps  # The sums, of about 25, are added in another order.
        actual = matmul.packed_linear(x, weight(), bias)
        torch.testing.assert_close(actual, expected(x, weight(), bias), rtol=0, atol=atol)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that an operation creates, in bytes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result


def test_memory_is_bounded_by_the_tile(monkeypatch):
    monkeypatch.setattr(matmul, "TILE_BYTES", 32 * COLUMNS * 4)
    monkeypatch.setattr(matmul, "_scratch", matmul._Scratch())
    packed, x = weight(rows=4096), torch.randn(1, COLUMNS)
    with Largest() as largest:
        matmul.packed_linear(x, packed, None)
    assert largest.bytes <= packed._qdata.nbytes
    assert len(matmul._scratch._bytes) == 32 * COLUMNS * 4


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name in ("aten::mm", "aten::addmm")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("tokens", "products"), [(512, 3), (8192, 1)], ids=["tiles", "whole"])
def test_on_a_gpu_a_weight_that_is_smaller_than_the_output_is_used_whole(tokens, products):
    """Meta tensors stand for those of a GPU; the decoded weight has 140 MiB."""
    rows, columns = 14336, 5120
    packed = torch.empty(QTYPES["Q6_K"].packed_shape((rows, columns)), dtype=torch.uint8, device="meta")
    x = torch.empty(tokens, columns, dtype=torch.bfloat16, device="meta")
    with torch.no_grad(), Products() as seen:
        out = matmul.packed_linear(x, pack(packed, "Q6_K", (rows, columns), x.dtype), x.new_empty(rows))
    assert out.shape == (tokens, rows)
    assert seen.count == products


def test_no_allocation_but_output_once_warm():
    packed, x, bias = weight(), torch.randn(3, COLUMNS), torch.randn(ROWS)
    matmul.packed_linear(x, packed, bias)
    before = matmul._scratch._bytes.data_ptr()
    matmul.packed_linear(x, packed, bias)
    assert matmul._scratch._bytes.data_ptr() == before


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
def test_no_product_into_a_slice_where_the_device_loses_it(with_bias, monkeypatch):
    monkeypatch.setattr(matmul, "TILE_BYTES", 16 * COLUMNS * 4)
    monkeypatch.setattr(matmul, "_LOSES_OUT_SLICES", ("cpu",))
    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, lambda *_, **__: None)
    x, bias = torch.randn(2, 5, COLUMNS), torch.randn(ROWS) if with_bias else None
    actual = matmul.packed_linear(x, weight(), bias)
    torch.testing.assert_close(actual, expected(x, weight(), bias), rtol=0, atol=1e-4)


def test_threads_do_not_share_a_tile():
    seen = []
    x = torch.randn(1, COLUMNS)

    def tile():
        seen.append(matmul._scratch.tile(4, x))

    threads = [threading.Thread(target=tile) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join()
    assert seen[0].data_ptr() != seen[1].data_ptr()


def test_the_next_layer_does_not_change_the_gradient_of_this():
    x = torch.randn(3, COLUMNS, requires_grad=True)
    first, second = weight("Q8_0"), weight("Q4_0")
    out = matmul.packed_linear(x, first, None)
    matmul.packed_linear(x.detach(), second, None)
    out.sum().backward()
    torch.testing.assert_close(x.grad, QTYPES["Q8_0"].dequantize(first._qdata).sum(0).expand(3, -1))


def test_a_patch_in_training_gets_its_gradient_whatever_the_input():
    """The text is not the output of a layer, so its gradient is not needed."""
    difference, bias = torch.zeros(ROWS, COLUMNS, requires_grad=True), torch.zeros(ROWS, requires_grad=True)
    x = torch.randn(3, COLUMNS)
    matmul.packed_linear(x, weight(), None, [lambda dense: dense + difference]).sum().backward()
    matmul.packed_linear(x, weight(), bias).sum().backward()
    torch.testing.assert_close(difference.grad, x.sum(0).expand(ROWS, -1))
    assert torch.equal(bias.grad, torch.full((ROWS,), 3.0))


def test_weight_of_more_than_2_31_elements():
    """All but the last rows are zeros that were never written, so they need no memory."""
    quant, columns = QTYPES["Q2_K"], 8192
    rows = (1 << 31) // columns + 16
    data = torch.zeros(quant.packed_shape((rows, columns)), dtype=torch.uint8)
    last = quant.quantize(torch.randn(2, columns), effort="fast")
    data[-2:] = last
    x = torch.randn(1, columns)
    with torch.inference_mode():
        out = matmul.packed_linear(x, pack(data, "Q2_K", (rows, columns), torch.float32), None)
    torch.testing.assert_close(out[:, -2:], linear(x, quant.dequantize(last)), rtol=0, atol=1e-2)
    assert out.count_nonzero() == 2
