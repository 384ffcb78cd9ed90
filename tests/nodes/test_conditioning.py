"""Save Conditioning followed by Load Conditioning."""

from __future__ import annotations

import pytest
import torch

from wanquant.nodes.load_conditioning import WanQuantLoadConditioning
from wanquant.nodes.save_conditioning import WanQuantSaveConditioning
from wanquant.quant import QuantError


def test_saved_prompt_is_listed_and_loaded(models):
    import folder_paths

    embedding = torch.randn(1, 5, 8)
    WanQuantSaveConditioning.execute([[embedding, {"guidance": 5.0}]], "set/ball.safetensors")
    (name,) = folder_paths.get_filename_list("conditioning")
    ((loaded, fields),) = WanQuantLoadConditioning.execute(name).args[0]
    assert torch.equal(loaded, embedding)
    assert fields == {"guidance": 5.0}


def test_name_outside_the_folder_is_refused(models):
    with pytest.raises(QuantError, match="is outside"):
        WanQuantSaveConditioning.execute([[torch.zeros(1), {}]], "../ball.safetensors")


def test_read_only_folder_is_reported(models, read_only, monkeypatch):
    monkeypatch.setattr("wanquant.nodes.save_conditioning.CONDITIONING", str(read_only))
    with pytest.raises(QuantError, match=r"ball\.safetensors: cannot be written: .*denied"):
        WanQuantSaveConditioning.execute([[torch.zeros(1), {}]], "ball.safetensors")
