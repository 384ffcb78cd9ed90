"""Collect Importance Matrix with blocks, Save Importance Matrix and Tune to GGUF."""

from __future__ import annotations

import comfy.sd
import pytest
import torch

from wanquant.nodes.collect_importance import WanQuantCollectImportance
from wanquant.nodes.convert import WanQuantConvert
from wanquant.nodes.save_importance import WanQuantSaveImportance
from wanquant.nodes.tune import WanQuantTune
from wanquant.quant import QuantError
from wanquant.tests.ops.tuning.test_tune_model import sample


@pytest.fixture
def dense(t2v):
    return comfy.sd.load_diffusion_model(str(t2v[0]), {"dtype": torch.float32})


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The host's folder of temporary files."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    return tmp_path / "temp"


def tune(model, **inputs):
    defaults = {
        "blocks": "none",
        "name": "tuned.gguf",
        "recipe": "Q4_0",
        "folder": "diffusion_models",
        "overwrite": False,
        "effort": "fast",
        "device": "cpu",
    }
    return WanQuantTune.execute(model, **{**defaults, **inputs}).args


def test_captured_model_is_tuned_from_the_list_and_from_a_link(models, dense, temporary):
    observed, collector, capture = WanQuantCollectImportance.execute(dense, "alike", blocks=0.01).args
    sample(observed)
    assert len(list(temporary.glob("*/*.safetensors"))) == len(capture)
    path, blocks = WanQuantSaveImportance.execute(collector, "wan.gguf", blocks=capture).args
    assert path.endswith("wan.gguf") and blocks.endswith("wan.blocks.safetensors")
    combo = next(entry for entry in WanQuantTune.define_schema().inputs if entry.id == "blocks")
    assert combo.options == ["none", "wan.blocks.safetensors"]
    listed = next(entry for entry in WanQuantConvert.define_schema().inputs if entry.id == "importance")
    assert listed.options == ["none", "wan.gguf"]
    assert WanQuantTune.validate_inputs(blocks="wan.blocks.safetensors")
    inputs = {"name": "tuned.gguf", "folder": "diffusion_models", "blocks": "wan.blocks.safetensors"}
    before = WanQuantTune.fingerprint_inputs(**inputs)
    assert "written in" in tune(dense, blocks="wan.blocks.safetensors")[2]
    assert "up to date" in tune(dense, blocks_path=blocks)[2]
    assert WanQuantTune.fingerprint_inputs(**inputs) != before


def test_without_blocks_nothing_is_captured(models, dense):
    _, collector, capture = WanQuantCollectImportance.execute(dense, "alike").args
    assert capture is None
    collector.add("blocks.0.ffn.0.weight", torch.randn(3, 256))
    assert WanQuantSaveImportance.execute(collector, "wan.gguf", blocks=None).args[1] == ""
    with pytest.raises(QuantError, match="has no blocks"):
        tune(dense)
    with pytest.raises(QuantError, match="not a name that ends in"):
        tune(dense, blocks_path="wan.gguf")


def test_nothing_captured_is_refused(models, dense, temporary):
    _, collector, capture = WanQuantCollectImportance.execute(dense, "alike", blocks=0.01).args
    collector.add("blocks.0.ffn.0.weight", torch.randn(3, 256))
    with pytest.raises(QuantError, match="nothing captured yet"):
        WanQuantSaveImportance.execute(collector, "wan.gguf", blocks=capture)


def test_absent_file_is_refused(models):
    assert "is not in" in WanQuantTune.validate_inputs(blocks="absent.blocks.safetensors")
