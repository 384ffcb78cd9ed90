"""Fixtures of the quantization tests."""

from __future__ import annotations

import pytest

from wanquant.quant import qtype
from wanquant.tests.libggml import LibGGML, load


@pytest.fixture(scope="session")
def libggml() -> LibGGML:
    return load()


@pytest.fixture
def torch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoding as where libggml-python is not installed."""
    monkeypatch.setattr(qtype, "_encoded_by_ggml", lambda *_: False)
