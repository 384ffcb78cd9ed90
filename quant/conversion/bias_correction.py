"""Biases that make up for the mean error of their layers.

With the error E of a weight and inputs of mean m, the outputs of a layer are off by E m on average. Adding that to the
bias costs no bytes. The rounding then only has to care for how the inputs vary.

Source: arXiv 1906.04721, section 4.2, and arXiv 1810.05723, section 4.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..device import has_float64
from ..encoders.rounding.exact import exact_product, rounded_matrix
from ..sources.checkpoint import Checkpoint, SourceTensor
from ..statistics.calibration import SPAN, Calibration
from ..statistics.importance import Importance
from .settings import Settings


def corrected_biases(settings: Settings, tensors: Mapping[str, SourceTensor]) -> dict[str, str]:
    """Return the biases that are corrected, by the names of their weights.

    They are those of the layers whose mean input was measured, or of all layers in the blocks if they are tuned. At
    effort "fast" there are none without a calibration, because all of its bytes are ggml's.
    """
    known = settings.importance
    weights: list[str] = []
    if settings.tuned:
        weights = [name for name, tensor in tensors.items() if name.startswith("blocks.") and len(tensor.shape) == 2]
    elif isinstance(known, Calibration) or (isinstance(known, Importance) and settings.effort != "fast"):
        weights = [name for name in known.totals if name in tensors]
    pairs = {name: f"{name.removesuffix('.weight')}.bias" for name in weights}
    return {weight: bias for weight, bias in pairs.items() if bias in tensors}


def with_biases_last(checkpoint: Checkpoint, biases: Mapping[str, str]) -> Checkpoint:
    """Return the checkpoint with these biases right behind their weights, whose errors they depend on."""
    moved, tensors = set(biases.values()), {}
    for name, tensor in checkpoint.tensors.items():
        if name not in moved:
            tensors[name] = tensor
        if name in biases:
            tensors[biases[name]] = checkpoint.tensors[biases[name]]
    return replace(checkpoint, tensors=tensors)


def mean_error(error: Tensor, mean: Tensor) -> Tensor:
    """Return the mean error of the outputs; its bits depend on neither threads nor other rows.

    Args:
        error: float32 (rows, in_features), of the weight.
        mean: float32 (in_features,), of the inputs.

    Returns:
        float32 (rows,), on the same device.
    """
    device = error.device
    if not has_float64(device):
        error, mean = error.cpu(), mean.cpu()
    total = error.new_zeros(len(error), dtype=torch.float64)
    for part, means in zip(torch.split(error, SPAN, 1), torch.split(mean, SPAN), strict=True):
        total += exact_product(rounded_matrix(means[None, None]), part.t()[None])[0, 0]
    return total.float().to(device)
