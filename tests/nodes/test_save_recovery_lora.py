"""Save Recovery LoRA, with and without an importance matrix."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

from wanquant.nodes.save_recovery_lora import WanQuantSaveRecoveryLora
from wanquant.quant import QuantError, write_importance
from wanquant.quant.statistics.importance import Importance

FILES = {"model_name": "t2v.gguf", "source": "t2v.safetensors"}


@pytest.fixture
def listed(models, t2v):
    for path in t2v:
        shutil.copy(path, models / "diffusion_models" / f"t2v{path.suffix}")
    return models


def save(**inputs):
    settings = {"size": 0.4, "name": "", "overwrite": False, "device": "cpu"}
    return WanQuantSaveRecoveryLora.execute(**{**FILES, **settings, **inputs}).args[0]


def test_lora_of_the_size_is_listed(listed):
    import folder_paths

    assert save() == "t2v-recovery.safetensors"
    assert folder_paths.get_filename_list("loras") == ["t2v-recovery.safetensors"]
    assert 0.3 < (listed / "loras" / "t2v-recovery.safetensors").stat().st_size / 2**20 <= 0.4
    with pytest.raises(QuantError, match="exists"):
        save()
    assert save(name="sub/other.safetensors").endswith("other.safetensors")


def test_importance_chooses_which_errors_are_removed(listed):
    name = "blocks.0.ffn.0"
    (listed.parent / "output" / "importance").mkdir()
    weights = Importance({f"{name}.weight": torch.full((256,), 1e6)}, {f"{name}.weight": 1.0}, 1)
    write_importance(listed.parent / "output" / "importance" / "i.gguf", weights)
    files = [listed / "loras" / save(name=f"{chosen}.safetensors", importance=chosen) for chosen in ("none", "i.gguf")]
    ranks = [len(load_file(file)[f"diffusion_model.{name}.lora_A.weight"]) for file in files]
    assert ranks[1] > 2 * ranks[0]


def test_unusable_choices_are_refused(listed):
    assert "nearest" in WanQuantSaveRecoveryLora.validate_inputs("t2w.gguf", "t2v.safetensors")
    with pytest.raises(QuantError, match="is outside"):
        save(name="../a.safetensors")
    with pytest.raises(QuantError, match="too small for rank 1"):
        save(size=0.001)


def test_fingerprint_follows_its_files(listed):
    inputs = {**FILES, "name": ""}
    save()
    before = WanQuantSaveRecoveryLora.fingerprint_inputs(**inputs)
    assert WanQuantSaveRecoveryLora.fingerprint_inputs(**inputs) == before
    (listed / "loras" / "t2v-recovery.safetensors").unlink()
    assert WanQuantSaveRecoveryLora.fingerprint_inputs(**inputs) != before
