"""The check for disk space and memory before the first byte of a conversion is written."""

from __future__ import annotations

import shutil
import sys
from types import SimpleNamespace

import psutil
import pytest

from wanquant.quant import QuantError
from wanquant.quant.conversion.convert import convert, convert_all
from wanquant.quant.conversion.settings import Settings, Target


@pytest.fixture
def free(monkeypatch):
    """A function that sets the free disk space and main memory in bytes."""

    def free(*, disk=1 << 50, memory=1 << 50):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=disk))
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=memory))

    return free


def test_disk_must_have_space_for_all_files_of_one_pass(tmp_path, source, free):
    targets = [Target(tmp_path / f"{recipe}.gguf", recipe) for recipe in ("Q8_0", "Q4_0")]
    sizes = [convert(source, target.destination, target.recipe, effort="fast").nbytes for target in targets]
    for target in targets:
        target.destination.unlink()
    free(disk=sum(sizes) - 1)
    with pytest.raises(QuantError, match=r"Q8_0\.gguf and 1 more: 0\.01 GiB needed, 0\.01 GiB free in the folder"):
        convert_all(source, targets, Settings(effort="fast"))
    assert not list(tmp_path.iterdir())
    free(disk=sum(sizes))
    assert [report.nbytes for report in convert_all(source, targets, Settings(effort="fast"))] == sizes


def test_too_little_main_memory_is_refused(tmp_path, source, free, monkeypatch):
    free(memory=1 << 20)
    with pytest.raises(
        QuantError, match=r"wan\.safetensors: converting needs 0\.25 GiB of main memory, but only 0\.00 GiB"
    ):
        convert(source, tmp_path / "a.gguf", "Q8_0", effort="fast")
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(sys.modules, "psutil", None)  # installed by ComfyUI only
    convert(source, tmp_path / "a.gguf", "Q8_0", effort="fast")
