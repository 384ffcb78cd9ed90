"""Weights that a block casts, patches and dequantizes once and uses for many chunks of tokens."""

from __future__ import annotations

from collections.abc import Callable

import comfy.ops
import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor
from torch.nn.functional import linear

from .. import host
from ..packed.layout import is_packed
from ..packed.linear import GGUFModule, GGUFOps
from ..packed.matmul import PatchedRows, WeightFunction

Projection = Callable[[Tensor], Tensor]
"""(..., input channels) -> (..., output channels), both floating point."""


def is_untouched(module: torch.nn.Module) -> bool:
    """Return whether a call of `module` runs the forward of its class, without hooks or another node's forward."""
    # When ComfyUI removes a replaced forward, it leaves the class's own on the instance.
    function = getattr(module.forward, "__func__", None)
    return function is type(module).forward and not (module._forward_hooks or module._forward_pre_hooks)


def is_known_linear(module: torch.nn.Module) -> bool:
    """Return whether `module` is a Linear of this pack or of ComfyUI, so that its weight may be used without a call."""
    ours_or_host = isinstance(module, GGUFOps.Linear) or type(module).__module__ == comfy.ops.__name__
    return ours_or_host and is_untouched(module)


def projection(module: comfy.ops.CastWeightBiasOp, like: Tensor) -> Projection:
    """Return a function that multiplies chunks with the weight of `module` and adds its bias.

    The weight is cast once. If `module` is not a known Linear, the function is `module` itself.

    Args:
        like: a tensor of any shape, of the chunks' device and dtype.
    """
    if not is_known_linear(module):
        return module  # type: ignore[no-any-return]
    weight, bias, functions, handle = _cast(module, like)
    try:
        if is_packed(weight):
            held = PatchedRows(weight, functions, like).dequantize_rows(0, like.new_empty(weight.shape))
        else:
            held = _kept(module, weight, handle)
    finally:  # also if memory runs out
        host.uncast(module, weight, bias, handle)
    return lambda x: linear(x, held, bias)


class RowProjection:
    """A known Linear of which some output channels are used at a time.

    Of a packed weight, only the rows of these channels are dequantized.
    """

    def __init__(self, module: comfy.ops.CastWeightBiasOp, like: Tensor) -> None:
        weight, self._bias, functions, handle = _cast(module, like)
        self._like, self._weight = like, _kept(module, weight, handle)
        host.uncast(module, weight, self._bias, handle)
        self._decoded = PatchedRows(self._weight, functions, like) if is_packed(weight) else None

    def features(self, features: slice) -> Projection:
        """Return a function that computes these output channels of the Linear."""
        weight, bias = self._rows(features), None if self._bias is None else self._bias[features]
        return lambda x: linear(x, weight, bias)

    def _rows(self, rows: slice) -> Tensor:
        size = rows.stop - rows.start
        if self._decoded and (rows.start % self._decoded.row_multiple or size % self._decoded.row_multiple):
            # A patch needs more rows than these, perhaps the whole weight.
            self._weight = self._decoded.dequantize_rows(0, self._like.new_empty(self._weight.shape))
            self._decoded = None
        if self._decoded is None:
            return self._weight[rows]
        return self._decoded.dequantize_rows(rows.start, self._like.new_empty(size, self._weight.shape[1]))


def norm_weight(norm: comfy.ops.CastWeightBiasOp, like: Tensor) -> Tensor:
    """Return the weight of a norm, (dim,), on the device and in the dtype of `like`."""
    weight, bias, _, handle = _cast(norm, like)
    kept = _kept(norm, weight, handle)
    host.uncast(norm, weight, bias, handle)
    return kept


def _cast(
    module: comfy.ops.CastWeightBiasOp, like: Tensor
) -> tuple[Tensor, Tensor | None, list[WeightFunction], object]:
    """Cast a module's parameters to the device and dtype of `like`.

    Returns:
        The weight, the bias, the functions still to apply to a packed weight, and the handle for `host.uncast`. The
        bias is a copy, because ComfyUI may reuse the memory of its own.
    """
    host.begin_use()
    if isinstance(module, GGUFModule):
        weight, bias, functions, handle = module.cast(like)
    else:
        weight, bias, handle = host.cast(module, like)
        functions = []
    return weight, None if bias is None else bias.clone(), functions, handle


def _kept(module: comfy.ops.CastWeightBiasOp, weight: Tensor, handle: object) -> Tensor:
    """Return a cast weight in memory that ComfyUI does not reuse for other modules.

    A weight in one of ComfyUI's own quantized formats is dequantized.
    """
    if isinstance(weight, QuantizedTensor) and not is_packed(weight):
        dequantized: Tensor = weight.dequantize()
        return dequantized
    # A conversion or a patch made a new tensor. Otherwise the weight may be ComfyUI's own buffer.
    unchanged = weight.dtype == module.weight.dtype and is_packed(weight) == is_packed(module.weight)
    patched = bool(module.weight_function) and not is_packed(weight)
    return weight.clone() if host.is_lent(module, handle) and unchanged and not patched else weight
