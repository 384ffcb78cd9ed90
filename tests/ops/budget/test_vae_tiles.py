"""The predicted peak of decoding equals that of ComfyUI's VAE on the CPU; tiles keep within the budget."""

from __future__ import annotations

import pytest
import torch
from comfy.ldm.modules.diffusionmodules.model import pytorch_attention
from comfy.model_patcher import ModelPatcher

from wanquant.ops.budget import vae_tiles
from wanquant.ops.budget.live_memory import LiveMemory
from wanquant.ops.budget.sampling_job import SamplingJob
from wanquant.ops.budget.vae_tiles import decoding_peak, tiles_within
from wanquant.quant.units import GIB

SMALL = SamplingJob.for_video(832, 480, 5)


@pytest.mark.parametrize("channels", [16, 48])
def test_agrees_with_a_real_decoder(channels, monkeypatch):
    """The VAE has few channels, a parameter of ComfyUI's class, so that it is fast."""
    wan = vae_tiles.comfy.ldm.wan
    module, width = (wan.vae2_2, {"dec_dim": 16}) if channels == 48 else (wan.vae, {})
    whole = module.WanVAE
    monkeypatch.setattr(module, "WanVAE", lambda dim, **kwargs: whole(dim=8, **width, **kwargs))
    for cache in (vae_tiles._meta_vae, vae_tiles._peak_without_weights):
        cache.cache_clear()
    simulated = decoding_peak(SamplingJob.for_video(64, 64, 5, channels=channels), 64, torch.float32)
    vae = module.WanVAE(dim=8, z_dim=channels, **vae_tiles._SAME).requires_grad_(False)
    for part in vae.modules():
        if isinstance(part, wan.vae.AttentionBlock):
            part.optimized_attention = pytorch_attention
    with LiveMemory("cpu") as memory:
        side = 4 if channels == 48 else 8
        vae.decode(torch.zeros(1, channels, 2, side, side))
    for cache in (vae_tiles._meta_vae, vae_tiles._peak_without_weights):
        cache.cache_clear()
    assert simulated.activation_bytes == pytest.approx(memory.peak.nbytes, rel=0.02)
    assert simulated.weight_bytes == sum(parameter.nbytes for parameter in vae.parameters())


def test_weights_that_are_streamed_are_no_other_decoding():
    """Nor is a tile of another video."""
    peaks = [decoding_peak(SMALL, 64, torch.bfloat16, streamed=streamed) for streamed in (False, True)]
    done = vae_tiles._peak_without_weights.cache_info().misses
    assert peaks[0].weight_bytes > peaks[1].weight_bytes
    assert peaks[0].activation_bytes == peaks[1].activation_bytes
    assert decoding_peak(SamplingJob.for_video(1280, 720, 5), 64, torch.bfloat16) == peaks[0]
    assert vae_tiles._peak_without_weights.cache_info().misses == done


def tiles(job, gib):
    return tiles_within(job, round(gib * GIB), torch.bfloat16)


def test_tiles_are_the_largest_within_the_budget():
    found = tiles(SMALL, 1.95)
    assert found.peak.total_bytes <= 1.95 * GIB < decoding_peak(SMALL, found.size + 64, torch.bfloat16).total_bytes
    assert found.overlap * 4 == found.size
    assert f"tiles of {found.size} pixels" in str(found)


def test_weights_are_streamed_if_they_leave_no_room():
    video = SamplingJob.for_video(1280, 704, 5, channels=48)
    whole, streamed = tiles(video, 3.26), tiles(video, 1.0)
    assert (whole.streamed, streamed.streamed) == (False, True)
    assert streamed.size > 64
    assert streamed.peak.total_bytes <= GIB
    assert str(streamed).endswith("its weights streamed")


def test_the_host_streams_a_vae():
    """The picture is the same on a device without room for weights, where each layer fetches its own."""
    vae = vae_tiles.comfy.ldm.wan.vae.WanVAE(dim=8, z_dim=16, **vae_tiles._SAME).requires_grad_(False)
    for parameter in vae.parameters():
        parameter.normal_(0, 0.05)
    latent, cpu = torch.randn(1, 16, 1, 4, 4), torch.device("cpu")
    expected = vae.decode(latent)
    patcher = ModelPatcher(vae, cpu, cpu)
    patcher.partially_load(cpu, 1)
    streamed = [part for part in vae.modules() if getattr(part, "comfy_cast_weights", False)]
    assert sum(p.nbytes for part in streamed for p in part.parameters()) > 0.99 * patcher.model_size()
    assert torch.equal(vae.decode(latent), expected)


def test_tiles_for_any_budget():
    assert tiles(SMALL, 100).size == 832
    assert tiles(SMALL, 0.4).size == 64
    assert 256 <= tiles(SamplingJob.for_video(1280, 704, 5, channels=48), 3.26).size <= 640
