"""Tuning of a loaded model to a GGUF, through the code of its own blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ...quant import QuantError
from ...quant.conversion.convert import ConversionReport
from ...quant.tuning.block import BlockModule
from ...quant.tuning.capture import CapturedCalls
from ...quant.tuning.tune import TuneSettings, tune
from ...quant.units import counted
from ..merged_source import merged_checkpoint
from .capture_blocks import OPTIONS, check_tunable, signature

_META = torch.device("meta")
# The compute dtype rounds a modulation differently in a capture of a GGUF or an FP8 model.
_TOLERANCE = 0.01


def tune_model(
    patcher: ModelPatcher, capture: str | Path, destination: str | Path, recipe: str, settings: TuneSettings
) -> ConversionReport:
    """Quantize a model block by block, as `tune` does.

    Args:
        patcher: the unquantized model, with or without LoRAs.
        capture: the path of a file by `Capture.write`.
        destination: the path of the .gguf file.

    Raises:
        QuantError: a model that cannot be tuned, is quantized already or is another one than was captured; also what
            `tune` raises.
    """
    model = getattr(patcher.model, "diffusion_model", None)
    if model is None:
        raise QuantError("MODEL: is not a diffusion model, expected a Wan transformer; connect one")
    check_tunable(model)
    calls = CapturedCalls.open(capture)
    try:
        _check_same(calls, model)
        checkpoint = merged_checkpoint(patcher, torch.device(settings.device))
        return tune(checkpoint, Path(destination), recipe, calls, block_module(model, patcher), settings)
    finally:
        calls.close()


def block_module(model: torch.nn.Module, patcher: ModelPatcher) -> BlockModule:
    """Return a block of the model's class on the meta device, with PyTorch's own layers."""
    config = {**patcher.model.model_config.unet_config, "num_layers": 1, "dtype": torch.float32}
    config.pop("disable_unet_model_creation", None)
    kind: Any = type(model)
    (block,) = kind(**config, device=_META, operations=torch.nn).blocks
    return BlockModule(block.requires_grad_(False), {OPTIONS: {}})


def _check_same(calls: CapturedCalls, model: torch.nn.Module) -> None:
    own, captured = signature(model), calls.signature
    is_as_wide = own.shape == captured.shape and own.shape[1] == 6 * calls.channels
    if is_as_wide and torch.allclose(own, captured, rtol=_TOLERANCE, atol=_TOLERANCE * float(own.std())):
        return
    raise QuantError(
        f"{calls.path}: was captured from another model ({counted(len(captured), 'block')}) than the connected one"
        f" ({counted(len(own), 'block')}); connect that model, or capture this one"
    )
