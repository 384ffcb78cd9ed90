"""Wan Low VRAM without a server: its prediction, the inputs it refuses, and the models it passes through."""

from __future__ import annotations

import comfy.sd
import pytest
import torch
from comfy_execution.caching import to_hashable

from wanquant.nodes.low_vram import WanQuantLowVRAM
from wanquant.ops.loading.diffusion_model import load_diffusion_model
from wanquant.quant import QuantError
from wanquant.quant.units import GIB
from wanquant.tests.ops.packed.foreign_tensors import with_foreign_weights


@pytest.fixture(scope="module")
def model(t2v):
    return load_diffusion_model(t2v[1], dtype=torch.float32)


def test_predicts_the_peak(model):
    limited, text, tile, overlap = WanQuantLowVRAM.execute(model, 3.5, 256, 256, 5).args
    assert text.startswith("0.7")
    assert "weights" in text
    assert text.endswith("GiB")
    assert f"tiles of {tile} pixels" in text
    assert (tile, overlap) == (256, 64)
    assert limited is not model
    assert limited.model is model.model


def test_preview_that_does_not_fit_is_reported_not_refused(model):
    limited, text, *_ = WanQuantLowVRAM.execute(model, 0.3, 256, 256, 5).args
    assert "needs at least 0.7" in text
    assert limited.wrappers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((-1, 256, 256, 5), "budget_gib -1"), ((3.5, 250, 256, 5), "250x256"), ((3.5, 256, 256, 6), "frames 6")],
)
def test_refuses_bad_input(model, arguments, message):
    with pytest.raises(QuantError, match=message):
        WanQuantLowVRAM.execute(model, *arguments)


def test_a_latent_replaces_the_typed_size(model):
    latent = {"samples": torch.zeros(1, 16, 2, 32, 32)}
    *typed, _ = WanQuantLowVRAM.execute(model, 3.5, 256, 256, 5).args
    *linked, _ = WanQuantLowVRAM.execute(model, 3.5, 832, 480, 81, latent).args
    assert typed[1:] == linked[1:]
    # A picture, and what samplers make of an empty latent for another model.
    *picture, _ = WanQuantLowVRAM.execute(model, 3.5, 256, 256, 1).args
    empty = {"samples": torch.zeros(1, 4, 16, 16), "downscale_ratio_spacial": 16}
    for other in ({"samples": torch.ones(1, 16, 32, 32)}, empty):
        assert WanQuantLowVRAM.execute(model, 3.5, 832, 480, 81, other).args[1:3] == tuple(picture[1:])
    for wrong in (torch.ones(1, 48, 2, 32, 32), torch.zeros(1, 16, 0, 32, 32)):
        with pytest.raises(QuantError, match=r"expected \(batch, 16, frames, height, width\)"):
            WanQuantLowVRAM.execute(model, 3.5, 256, 256, 5, {"samples": wrong})


def test_a_budget_of_zero_takes_what_is_there_and_is_never_cached(model, monkeypatch):
    monkeypatch.setattr("wanquant.nodes.low_vram.automatic_budget", lambda device: 2 * GIB)
    _, text, *tiles = WanQuantLowVRAM.execute(model, 0, 256, 256, 5).args
    assert text.startswith("budget 2.00 GiB: 0.7")
    assert tiles == list(WanQuantLowVRAM.execute(model, 2, 256, 256, 5).args[2:])
    for budget, keys in ((0, 2), (None, 2), (3.5, 1)):  # a linked budget is None
        found = {to_hashable([WanQuantLowVRAM.fingerprint_inputs(budget_gib=budget, width=1)]) for _ in range(2)}
        assert len(found) == keys, "as the host's cache compares them"


def test_says_that_a_budget_is_more_than_there_is(model, monkeypatch):
    monkeypatch.setattr("comfy.model_management.get_total_memory", lambda device: 8 * GIB)
    for budget, sentences in ((1024, 1), (8, 0), (0, 0)):
        text = WanQuantLowVRAM.execute(model, budget, 256, 256, 5).args[1]
        assert text.count("more than the 8.00 GiB of this device") == sentences


def test_says_how_many_int8_rows_are_kept(model, t2v):
    pytest.importorskip("comfy_kitchen.tensor.int8", reason="this ComfyUI has no INT8 arithmetic")
    int8 = load_diffusion_model(t2v[1], dtype=torch.float32, precision="int8")
    for each, sentences in ((int8, 1), (model, 0)):
        _, text, *_ = WanQuantLowVRAM.execute(each, 3.5, 256, 256, 17).args
        assert text.count("GiB of int8 rows are kept from step to step") == sentences


def test_other_models_pass_through(model, monkeypatch):
    monkeypatch.setattr(model.model, "diffusion_model", torch.nn.Identity())
    passed, text, *tiles = WanQuantLowVRAM.execute(model, 3.5, 256, 256, 5).args
    assert passed is model
    assert "not a Wan model" in text
    assert tiles == [256, 64]


def test_weights_of_another_pack_are_refused_in_one_sentence(t2v):
    foreign = with_foreign_weights(comfy.sd.load_diffusion_model(str(t2v[0]), {"dtype": torch.float32}), t2v[1])
    with pytest.raises(QuantError, match=r"StandInGGMLTensor.*; load the file with Load Diffusion Model \(Quantized\)"):
        WanQuantLowVRAM.execute(foreign, 3.5, 256, 256, 5)
