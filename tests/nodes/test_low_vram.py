"""Wan Low VRAM without a server: its prediction, the inputs it refuses, and the models it passes through."""

from __future__ import annotations

import comfy.sd
import pytest
import torch

from wanquant.nodes.low_vram import WanQuantLowVRAM
from wanquant.ops.loading.diffusion_model import load_diffusion_model
from wanquant.quant import QuantError
from wanquant.tests.ops.packed.foreign_tensors import with_foreign_weights


@pytest.fixture(scope="module")
def model(t2v):
    return load_diffusion_model(t2v[1], dtype=torch.float32)


def test_predicts_the_peak(model):
    limited, text, tile, overlap = WanQuantLowVRAM.execute(model, 3.5, 256, 256, 5).args
    assert text.startswith("0.5")
    assert "weights" in text
    assert text.endswith("GiB")
    assert f"tiles of {tile} pixels" in text
    assert (tile, overlap) == (256, 64)
    assert limited is not model
    assert limited.model is model.model


def test_preview_that_does_not_fit_is_reported_not_refused(model):
    limited, text, *_ = WanQuantLowVRAM.execute(model, 0.3, 256, 256, 5).args
    assert "needs at least 0.5" in text
    assert limited.wrappers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 256, 256, 5), "budget_gib 0"), ((3.5, 250, 256, 5), "250x256"), ((3.5, 256, 256, 6), "frames 6")],
)
def test_refuses_bad_input(model, arguments, message):
    with pytest.raises(QuantError, match=message):
        WanQuantLowVRAM.execute(model, *arguments)


def test_other_models_pass_through(model, monkeypatch):
    monkeypatch.setattr(model.model, "diffusion_model", torch.nn.Identity())
    passed, text, *tiles = WanQuantLowVRAM.execute(model, 3.5, 256, 256, 5).args
    assert passed is model
    assert "not a Wan model" in text
    assert tiles == [256, 64]


def test_weights_of_another_pack_are_refused_in_one_sentence(t2v):
    foreign = with_foreign_weights(comfy.sd.load_diffusion_model(str(t2v[0]), {"dtype": torch.float32}), t2v[1])
    with pytest.raises(QuantError, match=r"StandInGGMLTensor.*; load the file with Load Diffusion Model \(GGUF\)"):
        WanQuantLowVRAM.execute(foreign, 3.5, 256, 256, 5)
