"""Measurements of types on few elements, each made once for all tests."""

from __future__ import annotations

import pytest

from wanquant.quant.plan import layer_error
from wanquant.quant.plan import target_size as budget

measured = {}


def relative_error(qtype, weight, importance, effort):
    of_importance = None if importance is None else importance.numpy().tobytes()
    key = qtype.name, weight.shape, weight.numpy().tobytes(), of_importance, effort
    if key not in measured:
        measured[key] = layer_error.relative_error(qtype, weight, importance, effort)
    return measured[key]


@pytest.fixture(autouse=True)
def few_measurements(monkeypatch):
    monkeypatch.setattr(budget, "_SAMPLED_ELEMENTS", 1 << 12)
    monkeypatch.setattr(budget, "relative_error", relative_error)
