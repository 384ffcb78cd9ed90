"""Save Quantized Model followed by Load Diffusion Model (Quantized)."""

from __future__ import annotations

import pytest

from wanquant.nodes.load_diffusion_model import WanQuantLoader
from wanquant.nodes.save_model import WanQuantSaveModel
from wanquant.ops.loading.diffusion_model import load_diffusion_model
from wanquant.quant import QuantError


def save(model, **inputs):
    defaults = {
        "name": "merged.gguf",
        "recipe": "Q8_0",
        "folder": "diffusion_models",
        "overwrite": False,
        "effort": "fast",
        "device": "cpu",
    }
    return WanQuantSaveModel.execute(model, **{**defaults, **inputs}).args


def test_saved_model_is_listed_and_loaded(models, t2v):
    import folder_paths

    model = load_diffusion_model(t2v[1])
    path, picture, summary = save(model)
    assert folder_paths.get_filename_list("unet_gguf") == ["merged.gguf"]
    assert "written in" in summary and picture.shape[-1] == 3
    loaded = WanQuantLoader.execute("", "default", path=path).args[0]
    assert loaded.model.model_config.unet_config == model.model.model_config.unet_config
    assert "up to date" in save(model)[2]


def test_other_file_of_that_name_is_kept(models, t2v):
    model = load_diffusion_model(t2v[1])
    target = models / "diffusion_models" / "merged.gguf"
    target.write_bytes(b"something else")
    with pytest.raises(QuantError, match="is not this conversion"):
        save(model)
    assert target.read_bytes() == b"something else"
    assert "written in" in save(model, overwrite=True)[2]


def test_deleted_result_is_written_again(models, t2v):
    inputs = {"name": "merged.gguf", "folder": "diffusion_models", "recipe": "Q8_0"}
    before = WanQuantSaveModel.fingerprint_inputs(**inputs)
    path = save(load_diffusion_model(t2v[1]))[0]
    assert path.endswith("merged.gguf")
    assert WanQuantSaveModel.fingerprint_inputs(**inputs) != before
