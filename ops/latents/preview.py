"""A preview of a Wan latent in approximate colors, without a VAE."""

from __future__ import annotations

import comfy.latent_formats
import torch
from torch import Tensor

from ...quant import QuantError
from ...quant.plan.wan_shapes import pixels_per_cell

_FORMATS = {16: comfy.latent_formats.Wan21, 48: comfy.latent_formats.Wan22}


def model_space(samples: Tensor) -> Tensor:
    """Return a latent as the model sees it, with about unit variance in each channel; float32, on the CPU.

    Args:
        samples: latent of a sampler, floating point, (batch, channels, frames, height, width). It has 16 channels
            (Wan 2.1 and the Wan 2.2 14B experts) or 48 (Wan 2.2 5B).

    Raises:
        QuantError: `samples` is not a Wan video latent.
    """
    if samples.ndim != 5 or samples.shape[1] not in _FORMATS:
        raise QuantError(
            f"latent of shape {tuple(samples.shape)}: expected (batch, 16 or 48, frames, height, width);"
            " connect the LATENT of a Wan sampler"
        )
    latent: Tensor = _FORMATS[samples.shape[1]]().process_in(samples.float().cpu())
    return latent


def preview_frames(samples: Tensor) -> Tensor:
    """Return one RGB picture per latent frame, estimated by a linear function of the channels.

    Args:
        samples: as for `model_space`.

    Returns:
        float32 in 0..1, (batch * frames, pixel height, pixel width, 3), on the CPU.

    Raises:
        QuantError: `samples` is not a Wan video latent.
    """
    # ComfyUI's RGB factors apply to the model's space, not to what a sampler returns.
    latent = model_space(samples)
    channels = samples.shape[1]
    latent_format = _FORMATS[channels]
    factors = torch.tensor(latent_format.latent_rgb_factors)
    bias = torch.tensor(latent_format.latent_rgb_factors_bias)
    rgb = torch.einsum("bcthw,cr->btrhw", latent, factors) + bias.view(3, 1, 1)
    rgb = rgb.flatten(0, 1).add_(1).div_(2).clamp_(0, 1)
    rgb = torch.nn.functional.interpolate(rgb, scale_factor=pixels_per_cell(channels), mode="bilinear")
    return rgb.movedim(1, -1).contiguous()
