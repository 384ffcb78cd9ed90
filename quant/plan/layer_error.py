"""The error of a layer's outputs for each type of its weight, measured on rows of the weight.

It is the squared error relative to the squared outputs, for uncorrelated inputs. In ComfyUI's own formats the inputs
are quantized too, and their error counts: a W4A8 layer multiplies inputs of 8 bits, an INT4 layer those of 4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..native.inputs import rounded_inputs
from ..native.layer_type import LayerType
from ..qtype import Effort
from .recipe import StoredType

# The errors of inputs are averages over so many tokens and all channels.
_TOKENS = 64


def relative_error(qtype: StoredType, weight: Tensor, importance: Tensor | None, effort: Effort) -> float:
    """Return the squared error of a layer's outputs relative to the squared outputs, for exact inputs.

    Args:
        qtype: the type that `weight` is quantized to.
        weight: float32, (out_features, in_features).
        importance: floating point, (in_features,), the mean square of each input channel; None is 1 for all.
        effort: the effort of the encoder.
    """
    mean_squares = (torch.ones(()) if importance is None else importance).to(weight.device)
    error = qtype.dequantize(qtype.quantize(weight, importance, effort)).sub_(weight)
    output = (weight.square() * mean_squares).sum().clamp_(min=torch.finfo(torch.float32).tiny)
    if not output.isfinite() and (largest := weight.abs().amax()).isfinite():
        if not error.isfinite().all():
            return math.inf
        error, output = error / largest, ((weight / largest).square() * mean_squares).sum()
    return float((error.square_() * mean_squares).sum() / output)


def input_error(qtype: StoredType, weight: Tensor, importance: Tensor | None) -> float:
    """Return the squared error of a layer's outputs that the rounding of its inputs makes, relative to the outputs.

    The inputs are normally distributed. The error is 0 for types of GGUF, whose products take the inputs as they are.

    Args:
        qtype: the type of the weight.
        weight: float32, (out_features, in_features).
        importance: floating point, (in_features,), the mean square of each input channel; None is 1 for all.
    """
    if not isinstance(qtype, LayerType):
        return 0.0
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(_TOKENS, weight.shape[1], generator=generator).to(weight.device)
    if importance is not None:
        # FP8 has a fixed scale for inputs, whose usual size is near 1.
        inputs *= (importance / importance.mean().clamp(min=torch.finfo(torch.float32).tiny)).sqrt().to(inputs)
    largest = weight.abs().amax()
    rows = (weight / largest if largest > 0 else weight).T
    outputs, error = inputs @ rows, (rounded_inputs(qtype.format, inputs) - inputs) @ rows
    return float(error.square().sum() / outputs.square().sum().clamp_(min=torch.finfo(torch.float32).tiny))


def sampled_type(qtype: StoredType, weight: Tensor) -> StoredType:
    """Return the type for some rows of a weight, float32 (rows, in_features)."""
    rows, columns = weight.shape
    return LayerType(qtype.format, (rows, columns)) if isinstance(qtype, LayerType) else qtype
