"""Videos that ComfyUI samples in this process: loader, text encoder, sampler and VAE are its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.sd
import comfy.utils
import psutil
import torch
from torch import Tensor

from ...ops.budget.sampling_job import SamplingJob
from ...ops.conditioning import Conditioning, load_conditioning
from ...ops.conditioning_cache import ConditioningCache
from ...ops.encode_prompts import TextEncoder, encode_prompts
from ...ops.latents.preview import preview_frames
from ..harness import GIB, Row, sampled

SAVED = ".safetensors"
"""The suffix of a prompt that is a file of saved conditioning rather than a text."""


@dataclass(frozen=True)
class Settings:
    """What all videos of a measurement have in common; sizes in pixels."""

    width: int
    height: int
    frames: int
    steps: int
    cfg: float
    negative: str = ""
    sampler: str = "euler"
    scheduler: str = "simple"
    vae: Path | None = None

    def json(self) -> Row:
        """Return plain values; the VAE by its name."""
        return asdict(self) | {"vae": self.vae.name if self.vae else None}

    @property
    def forwards(self) -> int:
        """The runs of the transformer for one video."""
        return self.steps * (1 if self.cfg == 1 else 2)

    def job(self, channels: int) -> SamplingJob:
        """Return the sampling of one video whose latent has 16 or 48 channels."""
        return SamplingJob.for_video(self.width, self.height, self.frames, channels=channels)


def conditionings(prompts: Sequence[str], encoder: Path | None, folder: Path) -> dict[str, Conditioning]:
    """Return the conditioning of each prompt.

    Args:
        prompts: texts, or files of saved conditioning; the tokens of several are joined: A.safetensors+B.safetensors.
        encoder: the file of the text encoder, for texts.
        folder: where encoded texts are kept, so that a later run needs no text encoder.

    Raises:
        QuantError: a file cannot be read.
        SystemExit: a text without text encoder.
    """
    found = {prompt: _saved(prompt) for prompt in prompts if prompt.endswith(SAVED)}
    if texts := [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]:
        if encoder is None:
            raise SystemExit(
                f"prompt {texts[0]!r}: a text needs --text-encoder FILE; name it, or a file of Save Conditioning"
            )
        of_wan = TextEncoder(str(encoder.absolute()), (encoder,), "WAN")
        found |= dict(zip(texts, encode_prompts(of_wan, texts, ConditioningCache(folder)), strict=True))
    return found


def _saved(prompt: str) -> Conditioning:
    """Return saved conditionings, joined as ComfyUI's Conditioning (Concat) joins them."""
    first, *others = (load_conditioning(path) for path in prompt.split("+"))
    if not others:
        return first
    tokens, fields = first[0]
    return [[torch.cat([tokens, *(other[0][0] for other in others)], dim=1), fields]]


@dataclass(frozen=True)
class Video:
    """A sampled video: its latent, float32, (1, channels, frames, height, width), and what it cost."""

    latent: Tensor
    seconds_a_step: float
    """The median step, without the first, which loads weights; of a single step, that one."""
    peak_gib: float
    """The memory of the GPU, with whatever else uses it; without a GPU, the main memory of the process."""


def sample(
    model: Any,
    settings: Settings,
    positive: Conditioning,
    negative: Conditioning,
    seed: int,
) -> Video:
    """Sample a video as ComfyUI's KSampler does."""
    empty = torch.zeros(settings.job(model.model.latent_format.latent_channels).latent)
    ticks = [time.monotonic()]

    def tick(*_: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ticks.append(time.monotonic())

    arguments = (settings.steps, settings.cfg, settings.sampler, settings.scheduler, positive, negative, empty)
    with sampled(_used_bytes, 0.02) as used:
        noise = comfy.sample.prepare_noise(empty, seed)
        latent = comfy.sample.sample(model, noise, *arguments, callback=tick, disable_pbar=True, seed=seed)
    durations = [end - start for start, end in pairwise(ticks)]
    return Video(latent.float().cpu(), median(durations[1:] or durations), max(used) / GIB)


def _used_bytes() -> int:
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return int(total - free)
    return int(psutil.Process().memory_info().rss)


def unload() -> None:
    """Free the GPU's memory, so that the peak of the next video is its own."""
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()


class Decoder:
    """ComfyUI's VAE; without a file of one, the linear preview of the latent."""

    def __init__(self, path: Path | None) -> None:
        self._vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(path))) if path else None
        if self._vae:
            self._vae.throw_exception_if_invalid()

    def frames(self, latent: Tensor) -> Tensor:
        """Return the pictures of a latent: uint8, (frames, height, width, 3)."""
        pictures = self._vae.decode(latent) if self._vae else preview_frames(latent)
        return pictures.reshape(-1, *pictures.shape[-3:]).mul(255).round_().clamp_(0, 255).byte().cpu()


def similarity(reference: Tensor, frames: Tensor) -> float:
    """Return the mean SSIM of pictures, in windows of 11 x 11 pixels as its authors propose.

    Args:
        reference, frames: uint8, (frames, height, width, 3).
    """
    # Slow to import.
    from kornia.metrics import ssim

    pairs = ((frame.permute(2, 0, 1)[None] / 255 for frame in pair) for pair in zip(reference, frames, strict=True))
    return float(torch.stack([ssim(*pair, window_size=11).mean() for pair in pairs]).mean())
