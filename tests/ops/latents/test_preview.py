"""The preview of a latent has the colors of ComfyUI's own previewer."""

from __future__ import annotations

import pytest
import torch

from wanquant.ops.latents.preview import preview_frames
from wanquant.quant import QuantError


@pytest.mark.parametrize(("channels", "scale"), [(16, 8), (48, 16)])
def test_flat_latent_has_the_color_that_the_host_previews(channels, scale):
    import comfy.latent_formats
    from latent_preview import Latent2RGBPreviewer

    latent_format = {16: comfy.latent_formats.Wan21, 48: comfy.latent_formats.Wan22}[channels]()
    model_space = torch.randn(1, channels, 1, 1, 1).expand(1, channels, 3, 2, 4)
    frames = preview_frames(latent_format.process_out(model_space))
    assert frames.shape == (3, 2 * scale, 4 * scale, 3)
    assert frames.dtype == torch.float32
    previewer = Latent2RGBPreviewer(latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias)
    expected = torch.tensor(previewer.decode_latent_to_preview(model_space[:, :, 0]).getpixel((0, 0))) / 255
    torch.testing.assert_close(frames[0, 0, 0], expected, atol=1 / 255, rtol=0)


def test_refuses_image_latents():
    with pytest.raises(QuantError, match="expected \\(batch, 16 or 48, frames, height, width\\)"):
        preview_frames(torch.zeros(1, 4, 8, 8))
