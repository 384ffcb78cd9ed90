"""Fixtures of the quantization tests."""

from __future__ import annotations

import pytest

from wanquant.tests.libggml import LibGGML, load


@pytest.fixture(scope="session")
def libggml() -> LibGGML:
    return load()
