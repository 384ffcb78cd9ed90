"""The host and fixtures of tests/ops, with separate model folders for each test."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from wanquant.tests.ops.conftest import pytest_pycollect_makemodule, t2v, tiny_wan  # noqa: F401


@pytest.fixture
def models(tmp_path, monkeypatch):
    """An empty models folder, which the host uses for one test together with an empty output folder."""
    import folder_paths

    from wanquant.nodes.folders import register_folders

    for name in ("models/diffusion_models", "models/conditioning", "output"):
        (tmp_path / name).mkdir(parents=True)
    diffusion_models = ([str(tmp_path / "models" / "diffusion_models")], {".safetensors"})
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    folders = {
        "diffusion_models": diffusion_models,
        "text_encoders": ([str(tmp_path / "models" / "text_encoders")], set()),
        "loras": ([str(tmp_path / "models" / "loras")], {".safetensors"}),
    }
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", folders)
    register_folders()
    return tmp_path / "models"


@pytest.fixture
def read_only(tmp_path, monkeypatch):
    """A folder without write permission. Root may write everywhere, so root gets a folder of the kernel."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    folder.chmod(0o500)
    if os.access(folder, os.W_OK):
        folder = Path("/sys/kernel")
        # Folders of the kernel report no free space.
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 40))
    if not folder.is_dir():
        pytest.skip("this user can write to every folder")
    yield folder
    (tmp_path / "read-only").chmod(0o700)


@pytest.fixture
def folder(models, t2v):  # noqa: F811
    """The folder of diffusion models with a Wan as wan.safetensors and as wan-Q8_0.gguf."""
    folder = models / "diffusion_models"
    shutil.copy(t2v[0], folder / "wan.safetensors")
    shutil.copy(t2v[1], folder / "wan-Q8_0.gguf")
    return folder
