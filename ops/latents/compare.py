"""How far one latent is from another: the measure of what quantization costs on the same seed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...quant import QuantError
from .preview import model_space, preview_frames


@dataclass(frozen=True)
class LatentComparison:
    """Two latents of one shape. Errors are those of the model's own space, where each channel has unit variance."""

    psnr: float
    """In dB over the whole latent, its peak the range of the reference; infinite for equal latents."""
    cosine: float
    """Of the angle between both, as vectors."""
    frame_psnr: tuple[float, ...]
    """In dB, of each latent frame."""
    error: Tensor
    """(frames, height, width): root mean square over channels, in standard deviations of the model's space."""
    reference: Tensor
    compared: Tensor
    """Preview pictures, float32 (frames, pixel height, pixel width, 3) in 0..1."""

    def text(self) -> str:
        worst = min(range(len(self.frame_psnr)), key=self.frame_psnr.__getitem__)
        return (
            f"PSNR {self.psnr:.2f} dB, cosine {self.cosine:.6f}\n"
            f"worst frame {worst} of {len(self.frame_psnr)}: {self.frame_psnr[worst]:.2f} dB"
        )


def compare_latents(reference: Tensor, compared: Tensor) -> LatentComparison:
    """Measure `compared` against `reference`, both (batch, channels, frames, height, width) from a Wan sampler.

    A batch counts as further frames.

    Raises:
        QuantError: the latents differ in shape, or are not Wan video latents.
    """
    if reference.shape != compared.shape:
        raise QuantError(
            f"latents of shapes {tuple(reference.shape)} and {tuple(compared.shape)}: expected the same shape;"
            " sample both at the same size and length"
        )
    first, second = (model_space(samples).transpose(1, 2).flatten(0, 1) for samples in (reference, compared))
    squared = (second - first).square()
    peak = (first.max() - first.min()).item()
    return LatentComparison(
        psnr=_psnr(squared, peak),
        cosine=torch.nn.functional.cosine_similarity(first.flatten(), second.flatten(), dim=0).item(),
        frame_psnr=tuple(_psnr(frame, peak) for frame in squared),
        error=squared.mean(1).sqrt(),
        reference=preview_frames(reference),
        compared=preview_frames(compared),
    )


def _psnr(squared_error: Tensor, peak: float) -> float:
    mean = squared_error.mean().item()
    return 10 * math.log10(peak * peak / mean) if mean else math.inf
