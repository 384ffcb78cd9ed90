"""dev.py's set-up: what it installs, unpacks and refuses. The commands themselves run in continuous integration."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from wanquant import dev


def test_requirements_leave_torch_to_the_pins(tmp_path):
    (tmp_path / "requirements.txt").write_text("torch\ntorchvision\ntorchaudio\ntorchsde\n\n#optional\naiohttp>=3.11\n")
    requirements = dev._requirements(dev.Host("0.0.0", tmp_path, Path(sys.executable)))
    assert requirements[:4] == [dev.TORCH, dev.TORCHVISION, "torchsde", "aiohttp>=3.11"]
    assert any(line.startswith("pytest==") for line in requirements)
    assert all("==" in line for line in dev._test_tools())


def test_unpacks_only_regular_files_of_comfyui(tmp_path):
    archive = tmp_path / "a.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("a-1/vendor/ComfyUI/comfy/sd.py", "a-1/vendor/ComfyUI/../../../escaped", "a-1/setup.py"):
            entry = tarfile.TarInfo(name)
            entry.size = 1
            tar.addfile(entry, io.BytesIO(b"x"))
        link = tarfile.TarInfo("a-1/vendor/ComfyUI/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        tar.addfile(link)
    dev._unpack(archive, tmp_path / "out" / "ComfyUI")
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [tmp_path / "out/ComfyUI/comfy/sd.py"]
    assert not (tmp_path / "escaped").exists()


def test_link_follows_a_moved_repository(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        dev.link_folder(tmp_path / "links" / "pack", tmp_path / name)
    assert (tmp_path / "links" / "pack").samefile(tmp_path / "new")


@pytest.mark.parametrize(
    ("files", "python", "message"),
    [
        ((), None, "no comfyui_version.py"),
        (("comfyui_version.py",), None, "set COMFYUI_PYTHON"),
        (("comfyui_version.py",), "absent/python", "set COMFYUI_PYTHON"),
    ],
    ids=["not a checkout", "no interpreter", "absent interpreter"],
)
def test_refuses_an_unusable_comfyui_path(tmp_path, monkeypatch, files, python, message):
    for name in files:
        (tmp_path / name).write_text('__version__ = "0.30.0"\n')
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)
    if python:
        monkeypatch.setenv("COMFYUI_PYTHON", python)
    with pytest.raises(dev.DevError, match=message):
        dev.setup(None)


def test_comfyui_path_and_host_exclude_each_other(monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", "anywhere")
    with pytest.raises(dev.DevError, match="leave out --host"):
        dev.setup("0.27.0")


def test_demo_imports_without_a_host_on_the_path():
    code = dev.RUN_IN_PACKAGE.replace('run_name="__main__"', 'run_name="imported"')
    assert "imported" in code
    command = [sys.executable, "-I", "-c", code, str(dev.ROOT), "wanquant.bench.demo"]
    assert subprocess.run(command, check=False).returncode == 0
