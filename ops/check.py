"""The part of the check of the installation that runs in ComfyUI: loading, sampling, and the memory mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sample
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..quant import QuantError
from ..quant.check.parts import NATIVE, QUANTIZED, SOURCE, accelerator, product_parts
from ..quant.check.report import CheckReport, Finding, Part, run_parts
from ..quant.conversion.restore import restore
from . import host
from .host_version import host_version
from .latents.compare import compare_latents
from .loading.diffusion_model import load_diffusion_model
from .loading.native_model import load_native_model
from .packed.linear import packed_modules

_STEPS, _SEED = 2, 0
_LATENT, _PROMPT = (1, 16, 2, 8, 8), (1, 16, 4096)
_LEAST_PSNR, _LEAST_PSNR_OF_SOURCE = 30.0, 20.0
"""In dB: of the same weights in ComfyUI's own layers, and of the weights before they were quantized."""


def check_in_host(folder: Path, *, server: bool, done: Callable[[], None] = lambda: None) -> CheckReport:
    """Load and sample the files of a folder, and return the report.

    Args:
        folder: the folder that has the files of `quant.check.parts.file_parts`.
        server: whether this is a server, which has chosen its memory mode.
        done: called after each step.
    """
    parts = _parts(folder, server)
    report = CheckReport()
    with torch.inference_mode():  # as the server runs nodes
        for step in run_parts(parts):
            report.steps.append(step)
            done()
    report.name_skipped(parts)
    report.steps += run_parts(product_parts(accelerator()))  # here, because ComfyUI turns backends off at its start
    done()
    if not server:
        report.not_checked.append(
            "the memory mode: ComfyUI chooses it when it starts; run the node Check Installation to see it"
        )
    return report


def check_elsewhere(folder: str) -> dict[str, Any]:
    """Return the report of `check_in_host`, as JSON, for a process that is no server."""
    return check_in_host(Path(folder), server=False).json()


def _parts(folder: Path, server: bool) -> Sequence[Part]:
    memory: tuple[Part, ...] = (("memory", _memory),) if server else ()
    return (("load", partial(_load, folder)), ("sample", partial(_sample, folder)), *memory)


def _load(folder: Path) -> Finding:
    model = load_diffusion_model(folder / QUANTIZED)
    n_packed = sum(1 for _ in packed_modules(model.model))
    dtype, device = model.model.get_dtype_inference(), model.load_device
    return Finding(f"ComfyUI {host_version()} holds {n_packed} layers packed, for {device} in {dtype}")


def _sample(folder: Path) -> Finding:
    """Sample with the packed weights, with the same weights in the host's own layers, and with the source."""
    packed = load_diffusion_model(folder / QUANTIZED)
    dtype = packed.model.get_dtype_inference()
    restored = folder / "restored.safetensors"
    restore(folder / QUANTIZED, restored, "F32", overwrite=True)
    latent = _sampled(packed)
    same = compare_latents(_sampled(load_native_model(restored, dtype=dtype)), latent).psnr
    if not same >= _LEAST_PSNR:
        raise QuantError(
            f"{_STEPS} steps with packed weights are {same:.1f} dB from those of ComfyUI's own layers, expected at"
            f" least {_LEAST_PSNR:.0f}; update ComfyUI and WanQuant, and remove other packs that change layers"
        )
    source = _sampled(load_native_model(folder / SOURCE, dtype=dtype))
    of_source = compare_latents(source, latent).psnr
    closeness = "equal to" if math.isinf(same) else f"{same:.1f} dB from"
    text = f"{_STEPS} steps, {closeness} those of ComfyUI's own layers; {of_source:.1f} dB from the source with Q4_K_M"
    if not of_source >= _LEAST_PSNR_OF_SOURCE:
        raise QuantError(f"{text}: expected at least {_LEAST_PSNR_OF_SOURCE:.0f}; update WanQuant")
    if not host.has_int8():
        return Finding(text)
    native = compare_latents(source, _sampled(load_native_model(folder / NATIVE))).psnr
    return Finding(f"{text}, {native:.1f} dB with INT8")


def _sampled(model: ModelPatcher) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    noise, embedding = torch.randn(_LATENT, generator=generator), torch.randn(_PROMPT, generator=generator)
    prompt = [[0.1 * embedding, {}]]
    settings = (_STEPS, 1.0, "euler", "simple", prompt, prompt, torch.zeros(_LATENT))
    latent: Tensor = comfy.sample.sample(model, noise, *settings, disable_pbar=True, seed=_SEED)
    return latent.float().cpu()


def _memory() -> Finding:
    device = comfy.model_management.get_torch_device()
    if host.dynamic_vram():
        return Finding("dynamic VRAM streams the weights that do not fit")
    mode = comfy.model_management.vram_state.name
    text = f"ComfyUI's older memory manager ({mode}), without dynamic VRAM"
    if device.type != "cuda" or torch.version.hip:
        return Finding(text)
    return Finding(
        text,
        (
            "dynamic VRAM is off, which streams weights faster; start ComfyUI without flags against it, with the"
            " package comfy-aimdo installed (ComfyUI has none for WSL)",
        ),
    )
