"""Collect Importance Matrix, Save Importance Matrix and Convert to Quantized Model in a chain."""

from __future__ import annotations

import shutil

import pytest
import torch

from wanquant.nodes.collect_importance import WanQuantCollectImportance
from wanquant.nodes.convert import WanQuantConvert
from wanquant.nodes.save_importance import WanQuantSaveImportance
from wanquant.ops.loading.diffusion_model import load_diffusion_model
from wanquant.quant import QuantError, read_importance
from wanquant.quant.statistics.importance import Collector

NAME = "blocks.0.ffn.0.weight"


@pytest.fixture
def collector():
    collector = Collector()
    collector.add(NAME, torch.randn(3, 256))
    collector.samples = 1
    return collector


def convert(**inputs):
    defaults = {
        "source": "t2v.safetensors",
        "recipe": "Q4_0",
        "folder": "diffusion_models",
        "output_name": "",
        "overwrite": True,
        "effort": "fast",
        "device": "cpu",
    }
    return WanQuantConvert.execute(**{**defaults, **inputs}).args[2]


def test_model_is_a_clone_that_feeds_the_collector(t2v):
    model = load_diffusion_model(t2v[1])
    observed, handle, _ = WanQuantCollectImportance.execute(model, "alike").args
    assert observed.model is model.model and observed is not model
    assert isinstance(handle, Collector)
    with pytest.raises(QuantError, match="nothing collected"):
        WanQuantSaveImportance.execute(handle, "a.gguf")


def test_saved_matrix_is_listed_and_used(models, t2v, collector):
    import folder_paths

    shutil.copy(t2v[0], models / "diffusion_models" / "t2v.safetensors")
    path = WanQuantSaveImportance.execute(collector, "wan.gguf").args[0]
    assert folder_paths.get_filename_list("importance") == ["wan.gguf"]
    combo = next(i for i in WanQuantConvert.define_schema().inputs if i.id == "importance")
    assert combo.options == ["none", "wan.gguf"]
    assert "quantize.imatrix.file: wan.gguf" in convert(importance="wan.gguf")
    assert "up to date" in convert(importance_path=path)
    assert "quantize.imatrix" not in convert()


def test_calibration_is_saved_listed_and_used(models, t2v):
    import folder_paths

    observed = WanQuantCollectImportance.execute(load_diffusion_model(t2v[1]), "alike", calibrate=True)
    collector = observed.args[1]
    collector.add(NAME, torch.randn(300, 256))
    shutil.copy(t2v[0], models / "diffusion_models" / "t2v.safetensors")
    path = WanQuantSaveImportance.execute(collector, "importance.gguf").args[0]
    assert folder_paths.get_filename_list("importance") == ["importance.safetensors"]
    assert "wanquant.calibrated: True" in convert(importance_path=path)
    assert "up to date" in convert(importance="importance.safetensors")


def test_more_samples_replace_the_file(models, collector):
    path = WanQuantSaveImportance.execute(collector, "wan.gguf").args[0]
    collector.add(NAME, torch.randn(3, 256))
    collector.samples += 1
    assert WanQuantSaveImportance.execute(collector, "wan.gguf").args[0] == path
    assert read_importance(path).samples == 2
    fingerprint = WanQuantSaveImportance.fingerprint_inputs(name="wan.gguf")
    assert fingerprint != fingerprint, "the host saves again although no input changed"


def test_name_outside_the_folder_is_refused(models, collector):
    with pytest.raises(QuantError, match="is outside"):
        WanQuantSaveImportance.execute(collector, "../wan.gguf")
