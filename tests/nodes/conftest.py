"""The same host and fixtures as tests/ops, with model folders of the test's own."""

from __future__ import annotations

import pytest

from wanquant.tests.ops.conftest import (  # noqa: F401
    pytest_pycollect_makemodule,
    t2v,
    tiny_wan,
)


@pytest.fixture
def models(tmp_path, monkeypatch):
    """An empty models folder and output folder that the host uses for one test."""
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
    }
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", folders)
    register_folders()
    return tmp_path / "models"
