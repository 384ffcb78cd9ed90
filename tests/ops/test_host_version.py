"""The refusal of hosts that are too old."""

from __future__ import annotations

import sys

import pytest

from wanquant.ops.host_version import MINIMUM_HOST, require_host
from wanquant.quant import QuantError


@pytest.mark.parametrize("version", [None, MINIMUM_HOST, "0.27.0", "0.30.1rc2", "1.0", "0.100.0"])
def test_accepted(version):
    require_host(version)


@pytest.mark.parametrize("version", ["0.3.50", "0.20.1", "0.23.9"])
def test_refused_in_words(version):
    with pytest.raises(QuantError, match=rf"ComfyUI {version} is too old, {MINIMUM_HOST} or newer is needed"):
        require_host(version)


def test_host_without_a_version(monkeypatch):
    monkeypatch.setitem(sys.modules, "comfyui_version", None)
    with pytest.raises(QuantError, match="update ComfyUI"):
        require_host()
