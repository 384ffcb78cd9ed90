"""The comparison of latents returns figures that were calculated by hand."""

from __future__ import annotations

import math

import comfy.latent_formats
import pytest
import torch

from wanquant.ops.latents import compare_chart
from wanquant.ops.latents.compare import compare_latents
from wanquant.ops.latents.compare_chart import draw
from wanquant.quant import QuantError


def latent(model_space):
    return comfy.latent_formats.Wan21().process_out(model_space)


def test_known_error_in_one_frame():
    reference = torch.zeros(1, 16, 3, 2, 4)
    reference[:, 0] = 1.0  # a range of 1
    compared = reference.clone()
    compared[:, :, 1] += 0.1
    result = compare_latents(latent(reference), latent(compared))
    assert result.frame_psnr[1] == pytest.approx(20.0, abs=1e-3)
    assert min(result.frame_psnr[0], result.frame_psnr[2]) > 100
    assert result.psnr == pytest.approx(20.0 + 10 * math.log10(3), abs=1e-3)
    assert result.error[1].allclose(torch.tensor(0.1), atol=1e-5)
    assert result.error.shape == (3, 2, 4)
    assert 0 < result.cosine < 1
    assert result.message() == "The latents differ most in frame 1 of 3: 20.00 dB"


def test_equal_latents():
    samples = torch.randn(2, 48, 2, 2, 2)
    result = compare_latents(samples, samples.clone())
    assert result.psnr == math.inf
    assert result.cosine == pytest.approx(1.0, abs=1e-9)
    assert len(result.frame_psnr) == 4
    assert result.message() == "The latents are equal"
    assert result.figures().startswith("PSNR inf dB")
    assert draw(result).width == 540


@pytest.mark.parametrize("frames", [1, 3, 21])
def test_picture_has_the_same_width_for_any_number_of_frames(frames):
    samples = torch.randn(1, 16, frames, 4, 6)
    picture = draw(compare_latents(samples, samples + 0.1 * torch.randn_like(samples)))
    assert picture.width == 540


@pytest.mark.parametrize(
    ("worst", "shown"), [(0, [0, 7, 13, 20]), (2, [2, 7, 13, 20]), (9, [0, 9, 13, 20]), (19, [0, 7, 13, 19])]
)
def test_frame_that_differs_most_is_shown(worst, shown):
    assert compare_chart._frames(21, 4, worst) == shown
    assert compare_chart._frames(1, 1, 0) == [0]


def test_refuses_other_shapes():
    with pytest.raises(QuantError, match="expected the same shape"):
        compare_latents(torch.zeros(1, 16, 1, 2, 2), torch.zeros(1, 16, 2, 2, 2))
    with pytest.raises(QuantError, match="16 or 48"):
        compare_latents(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8))
