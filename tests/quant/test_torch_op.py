"""torch.ops.wanquant.dequantize meets torch's rules for operators, and uses each path where it works."""

from __future__ import annotations

import importlib
import sys
import types

import pytest
import torch
from torch import Tensor

from wanquant.quant import QTYPES, QuantError, QuantType
from wanquant.quant import torch_op as op
from wanquant.quant.kernels.optional import OptionalPath
from wanquant.tests.quant.samples import random_blocks

every_type = pytest.mark.parametrize("quant", QTYPES.values(), ids=QTYPES.keys())


@every_type
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operator_passes_opcheck(quant: QuantType, dtype: torch.dtype) -> None:
    packed = (random_blocks(quant, 6) & 63).view(2, -1)  # finite scales: opcheck compares NaN as unequal
    torch.library.opcheck(torch.ops.wanquant.dequantize.default, (packed, quant.name, dtype))


def test_fake_tensors_dequantize_to_the_right_shape() -> None:
    packed = torch.empty(3, 5, 288, dtype=torch.uint8, device="meta")
    weight = QTYPES["Q4_K"].dequantize(packed, torch.float16)
    assert (weight.shape, weight.dtype, weight.device.type) == ((3, 5, 512), torch.float16, "meta")


def test_shapes_may_have_more_than_2_31_elements() -> None:
    packed = torch.empty(1 << 20, 16 * 144, dtype=torch.uint8, device="meta")
    assert QTYPES["Q4_K"].dequantize(packed, torch.float16).shape == (1 << 20, 4096)
    with pytest.raises(QuantError, match="Q4_K"):
        op.dequantize_into(packed, "Q4_K", torch.empty((1 << 32) - 256, dtype=torch.float16, device="meta"))


def test_second_copy_of_the_pack_shares_the_operator() -> None:
    copy = types.ModuleType("second_copy")
    copy.__path__ = sys.modules["wanquant"].__path__
    sys.modules["second_copy"] = copy
    try:
        quant = importlib.import_module("second_copy.quant")
        packed = random_blocks(QTYPES["Q4_K"], 2)
        assert torch.equal(quant.QTYPES["Q4_K"].dequantize(packed), QTYPES["Q4_K"].dequantize(packed))
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "second_copy"]:
            del sys.modules[name]


def optional_path(monkeypatch: pytest.MonkeyPatch, dequantize) -> OptionalPath:
    module = types.SimpleNamespace(dequantize=dequantize)
    monkeypatch.setitem(sys.modules, "wanquant.quant.kernels.fake", module)
    path = OptionalPath("fake", "fakes")
    monkeypatch.setitem(op._PATHS, "cpu", path)
    return path


def test_an_optional_path_gets_aligned_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def dequantize(quant: QuantType, packed: Tensor, out: Tensor) -> bool:
        if quant.name != "Q8_0":
            return False
        assert packed.is_contiguous()
        assert packed.data_ptr() % 16 == 0
        seen.append((quant.name, packed.shape))
        out.fill_(3)
        return True

    optional_path(monkeypatch, dequantize)
    blocks = random_blocks(QTYPES["Q8_0"], 6)
    odd = torch.cat((blocks.new_zeros(1), blocks.flatten()))[1:].view(6, 34)
    for packed in (blocks, blocks[::2], odd):
        assert (QTYPES["Q8_0"].dequantize(packed, torch.float16) == 3).all()
    assert not (QTYPES["Q4_0"].dequantize(random_blocks(QTYPES["Q4_0"], 1)) == 3).all()
    assert QTYPES["Q8_0"].dequantize(torch.empty(3, 0, dtype=torch.uint8)).shape == (3, 0)
    assert seen == [("Q8_0", (6, 34)), ("Q8_0", (3, 34)), ("Q8_0", (6, 34))]


FAILURES = [ImportError, OSError, RuntimeError, ValueError, TypeError, AttributeError, LookupError]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: error.__name__)
def test_a_path_that_fails_for_a_type_is_dropped_for_it_with_one_warning(error, monkeypatch, caplog) -> None:
    calls = []

    def fail(quant: QuantType, *_: object) -> bool:
        calls.append(quant.name)
        if quant.name == "Q8_0":
            raise error("no compiler\nand a long explanation")
        return False

    path = optional_path(monkeypatch, fail)
    packed = random_blocks(QTYPES["Q8_0"], 2)
    expected = QTYPES["Q8_0"].dequantize_blocks(packed)
    for _ in range(2):
        assert torch.equal(QTYPES["Q8_0"].dequantize(packed).nan_to_num(), expected.nan_to_num())
    QTYPES["Q4_0"].dequantize(random_blocks(QTYPES["Q4_0"], 2))
    assert (calls, path.lost) == (["Q8_0", "Q4_0"], {"Q8_0"})
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "fakes failed for Q8_0 (no compiler); WanQuant uses slower torch operations for it")
    ]


def test_a_missing_path_is_logged_once(caplog) -> None:
    path = OptionalPath("absent", "absentees")
    with caplog.at_level("INFO"):
        for _ in range(2):
            assert path.dequantize(QTYPES["Q8_0"], torch.zeros(1, 34, dtype=torch.uint8), torch.empty(1, 32)) is False
    assert len(caplog.messages) == 1
    assert "absentees cannot be used here (No module named" in caplog.text


def test_out_of_memory_does_not_drop_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError

    optional_path(monkeypatch, fail)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            QTYPES["Q8_0"].dequantize(random_blocks(QTYPES["Q8_0"], 1))


@pytest.mark.parametrize(
    ("packed", "out"),
    [
        (torch.zeros(2, 34, dtype=torch.uint8), torch.empty(2, 64)),
        (torch.zeros(2, 34, dtype=torch.uint8), torch.empty(32, 2).t()),
        (torch.zeros(2, 34, dtype=torch.int8), torch.empty(2, 32)),
        (torch.zeros(2, 33, dtype=torch.uint8), torch.empty(2, 32)),
        (torch.zeros(0, 34, dtype=torch.uint8), torch.empty(1, 32)),
    ],
    ids=["output too long", "output with strides", "not bytes", "cut", "nothing"],
)
def test_sizes_and_strides_that_would_access_memory_out_of_bounds_are_refused(packed: Tensor, out: Tensor) -> None:
    with pytest.raises(QuantError, match="Q8_0"):
        op.dequantize_into(packed, "Q8_0", out)
