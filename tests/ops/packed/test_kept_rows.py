"""8-bit rows that a layer keeps: which products use them, when others are made, and how they end."""

from __future__ import annotations

import pytest
import torch

from wanquant.ops.packed import int8
from wanquant.ops.packed.int8 import AutoOps, Int8Ops
from wanquant.ops.packed.kept_rows import KeptRows, row_bytes
from wanquant.tests.ops.packed.test_int8 import lora_of, weight_and_input

pytest.importorskip("comfy_kitchen.tensor.int8", reason="this ComfyUI has no INT8 arithmetic")

ROWS, COLUMNS = 96, 2048


@pytest.fixture
def layer():
    _, packed, _ = weight_and_input()
    layer = Int8Ops.Linear(COLUMNS, ROWS, bias=False)
    layer.weight = torch.nn.Parameter(packed, requires_grad=False)
    return layer.requires_grad_(False)


@pytest.fixture
def x():
    return weight_and_input()[2]


@pytest.fixture
def made(monkeypatch):
    """Return the list of how many rows were made at a time."""
    made, make = [], int8.int8_rows_into

    def note(packed, *arguments):
        made.append(len(packed))
        make(packed, *arguments)

    monkeypatch.setattr(int8, "int8_rows_into", note)
    return made


def keep(layer, nbytes):
    kept = KeptRows(nbytes, torch.device("cpu"))
    kept.attach([layer])
    return kept


@torch.no_grad()
def test_rows_are_made_once_until_they_are_released(layer, x, made):
    expected = layer(x)
    kept = keep(layer, row_bytes(ROWS, COLUMNS))
    assert all(torch.equal(layer(x), expected) for _ in range(3))
    assert kept.used_bytes == row_bytes(ROWS, COLUMNS) == ROWS * (COLUMNS + 4)
    assert made == [ROWS] * 2
    kept.release()
    assert kept.used_bytes == 0 and torch.equal(layer(x), expected)
    assert made == [ROWS] * 3


@torch.no_grad()
def test_rows_without_room_are_made_each_time(layer, x, made):
    expected = layer(x)
    keep(layer, row_bytes(ROWS, COLUMNS) - 1)
    assert torch.equal(layer(x), expected) and torch.equal(layer(x), expected)
    assert made == [ROWS] * 3


@torch.no_grad()
def test_other_loras_need_other_rows(layer, x, made):
    loras = [[], *([lora_of(layer.weight, rank)[0]] for rank in (4, 8))]

    def products():
        for layer.weight_function in loras:
            yield layer(x)

    expected = list(products())
    made.clear()
    keep(layer, len(loras) * row_bytes(ROWS, COLUMNS))
    for _ in range(3):
        assert all(torch.equal(*pair) for pair in zip(products(), expected, strict=True))
    assert made == [ROWS] * len(loras)


@torch.no_grad()
def test_rows_with_functions_of_other_nodes_are_made_each_time(layer, x):
    factors = iter((1.0, 2.0, 4.0))
    layer.weight_function = [lambda weight: weight * next(factors)]
    kept = keep(layer, row_bytes(ROWS, COLUMNS))
    once, twice, four_times = (layer(x) for _ in range(3))
    assert torch.equal(2 * once, twice) and torch.equal(2 * twice, four_times)
    assert kept.used_bytes == 0


@torch.no_grad()
def test_few_tokens_keep_nothing(layer, x):
    kept = keep(layer, row_bytes(ROWS, COLUMNS))
    layer(x[: layer.least_tokens - 1])
    assert kept.used_bytes == 0
    layer(x[: layer.least_tokens])
    assert kept.used_bytes > 0
    assert AutoOps.Linear.least_tokens > Int8Ops.Linear.least_tokens
