"""The difference between two latents, which measures what quantization changes for the same seed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...quant import QuantError
from .preview import model_space, preview_frames


@dataclass(frozen=True)
class LatentComparison:
    """The difference between two latents of the same shape.

    It is measured in the space that the model sees, where each channel has about unit variance.
    """

    psnr: float
    """PSNR of the whole latent in dB, relative to the range of the reference. It is infinite for equal latents."""
    cosine: float
    """Cosine similarity of the latents as vectors."""
    frame_psnr: tuple[float, ...]
    """PSNR of each latent frame in dB."""
    error: Tensor
    """Root mean square over channels, in standard deviations of a channel; float32, (frames, height, width)."""
    reference: Tensor
    """Preview of the reference, float32 in 0..1, (frames, pixel height, pixel width, 3)."""
    compared: Tensor
    """Preview of the compared latent, like `reference`."""

    @property
    def worst_frame(self) -> int:
        """The number of the latent frame that differs most."""
        return min(range(len(self.frame_psnr)), key=self.frame_psnr.__getitem__)

    def message(self) -> str:
        """Return in words where the latents differ."""
        if self.psnr == math.inf:
            return "The latents are equal"
        worst = self.worst_frame
        return f"The latents differ most in frame {worst} of {len(self.frame_psnr)}: {self.frame_psnr[worst]:.2f} dB"

    def figures(self) -> str:
        """Return the figures of the whole latent."""
        return f"PSNR {self.psnr:.2f} dB, cosine {self.cosine:.6f}"


def compare_latents(reference: Tensor, compared: Tensor) -> LatentComparison:
    """Compare two latents of a Wan sampler. The frames of all videos in a batch are counted as one sequence.

    Args:
        reference: floating point, (batch, 16 or 48, frames, height, width).
        compared: like `reference`.

    Raises:
        QuantError: the latents differ in shape or are not Wan video latents.
    """
    if reference.shape != compared.shape:
        raise QuantError(
            f"latents of shapes {tuple(reference.shape)} and {tuple(compared.shape)}: expected the same shape;"
            " sample both at the same size and with the same number of frames"
        )
    first, second = (model_space(samples).transpose(1, 2).flatten(0, 1) for samples in (reference, compared))
    squared = (second - first).square()
    value_range = (first.max() - first.min()).item()
    return LatentComparison(
        psnr=_psnr(squared, value_range),
        cosine=torch.nn.functional.cosine_similarity(first.double().flatten(), second.double().flatten(), dim=0).item(),
        frame_psnr=tuple(_psnr(frame, value_range) for frame in squared),
        error=squared.mean(1).sqrt(),
        reference=preview_frames(reference),
        compared=preview_frames(compared),
    )


def _psnr(squared_error: Tensor, value_range: float) -> float:
    mean = squared_error.mean().item()
    return 10 * math.log10(value_range**2 / mean) if mean else math.inf
