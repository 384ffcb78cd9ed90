"""The pack must not slow down ComfyUI's start; `dev.py bench load` measures its time there."""

from __future__ import annotations

import pytest

from wanquant.bench.load import late_modules, start_up
from wanquant.testing.hosts import checkout

FEW = 8
"""Limit of the modules besides the pack's own that ComfyUI has not imported itself."""


def test_start_loads_nothing_large_and_little_else() -> None:
    if not checkout().is_dir():
        pytest.skip(f"no ComfyUI at {checkout()}: run `python3 dev.py setup`, or set COMFYUI_PATH")
    modules = start_up()["modules"]
    assert not late_modules(modules)
    assert len([name for name in modules if name.partition(".")[0] != "pack"]) <= FEW
