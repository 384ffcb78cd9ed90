"""Weights that a block casts, patches and prepares once and uses for many chunks of tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.ops
import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor
from torch.nn.functional import linear

from .. import host, host_products
from ..packed.layout import is_packed
from ..packed.linear import GGUFModule, GGUFOps
from ..packed.matmul import HeldProduct, PatchedRows, WeightFunction, hold_dense

Projection = Callable[[Tensor], Tensor]
"""(..., input channels) -> (..., output channels), both floating point."""

Inputs = Callable[[], Iterable[Tensor]]
"""Returns all chunks with which a projection will be called, in any order."""


def is_untouched(module: torch.nn.Module) -> bool:
    """Return whether a call of `module` runs the forward of its class, without hooks or another node's forward."""
    return is_own(module, "forward") and not (module._forward_hooks or module._forward_pre_hooks)


def is_own(module: torch.nn.Module, method: str) -> bool:
    """Return whether a method of `module` is that of its class, not another node's."""
    # When ComfyUI removes a replaced forward, it leaves the class's own on the instance. The simulator's has other
    # globals, but the same code.
    code = getattr(getattr(getattr(module, method), "__func__", None), "__code__", None)
    return code is not None and code is getattr(getattr(type(module), method), "__code__", None)


def is_known_linear(module: torch.nn.Module) -> bool:
    """Return whether `module` is a Linear of this pack or of ComfyUI, so that its weight may be used without a call."""
    ours_or_host = isinstance(module, GGUFOps.Linear) or type(module).__module__ == comfy.ops.__name__
    return ours_or_host and is_untouched(module)


def projection(module: comfy.ops.CastWeightBiasOp, like: Tensor, inputs: Inputs | None = None) -> Projection:
    """Return a function that multiplies chunks of tokens as the layer `module` multiplies all of them.

    The weight is cast once, and kept as the layer multiplies with it: packed weights dequantized or in 8-bit integers,
    weights in ComfyUI's own formats as they are. If `module` is not a known Linear, the function is `module` itself.

    Args:
        like: a tensor with all tokens, (..., tokens, channels), of the chunks' device and dtype.
        inputs: yields what the function will be called with. It is called where the scale of the input depends on all
            tokens. Without it, such a weight is dequantized.
    """
    if not is_known_linear(module):
        return module  # type: ignore[no-any-return]
    cast = _cast(module, like, inputs)
    try:
        if is_packed(cast.weight):
            everything = slice(0, module.weight.shape[0])
            product = _hold(module, PatchedRows(cast.weight, cast.functions, like), everything, like)
            return lambda x: product(x, cast.bias)
        return _product(module, _kept(module, cast.weight, cast.handle), cast.bias, cast.scale)
    finally:  # also if memory runs out
        host.uncast(module, cast.weight, cast.bias, cast.handle)


class RowProjection:
    """A known Linear of which some output channels are used at a time.

    Of a packed weight, only the rows of these channels are prepared. The arguments are those of `projection`.
    """

    def __init__(self, module: comfy.ops.CastWeightBiasOp, like: Tensor, inputs: Inputs | None = None) -> None:
        cast = _cast(module, like, inputs)
        self._module, self._like, self._bias, self._scale = module, like, cast.bias, cast.scale
        try:
            self._weight = _kept(module, cast.weight, cast.handle)
        finally:
            host.uncast(module, cast.weight, cast.bias, cast.handle)
        self._patched = PatchedRows(self._weight, cast.functions, like) if is_packed(self._weight) else None

    def features(self, features: slice) -> Projection:
        """Return a function that computes these output channels of the Linear."""
        bias, size = None if self._bias is None else self._bias[features], features.stop - features.start
        patched = self._patched
        if patched and (features.start % patched.row_multiple or size % patched.row_multiple):
            # A patch needs more rows than these, perhaps the whole weight.
            self._weight = patched.dequantize_rows(0, self._like.new_empty(patched.shape))
            self._patched = patched = None
        if patched:
            product = _hold(self._module, patched, features, self._like)
            return lambda x: product(x, bias)
        return _product(self._module, self._rows(features), bias, self._scale)

    def _rows(self, rows: slice) -> Tensor:
        """Return rows of the weight, quantized where it is and can be cut there."""
        if not isinstance(self._weight, QuantizedTensor):
            return self._weight[rows]
        part = host_products.rows(self._weight, rows.start, rows.stop)
        if part is None:
            self._weight = _dequantized(self._weight)
            part = self._weight[rows]
        return part


def in_turn(container: torch.nn.Sequential, layers: list[Projection]) -> list[Projection]:
    """Return what to call in turn to compute as `container` does: its layers, or its own forward around them.

    From 0.31 on, ComfyUI's forward of an FFN applies the activation within the product with weights in its INT8 format.

    Args:
        layers: of the container, prepared.
    """
    own = type(container).forward
    if own is torch.nn.Sequential.forward or not all(isinstance(layer, torch.nn.Module) for layer in layers):
        return layers
    held = copy.copy(container)
    vars(held)["_modules"] = dict(zip(container._modules, layers, strict=True))
    forward: Any = container.forward  # that of the instance: the simulator's has other globals
    return [partial(forward.__func__, held)]


def norm_weight(norm: comfy.ops.CastWeightBiasOp, like: Tensor) -> Tensor:
    """Return the weight of a norm, (dim,), on the device and in the dtype of `like`."""
    host.begin_use()
    weight, bias, handle = host.cast(norm, like)
    kept = _kept(norm, weight, handle)
    host.uncast(norm, weight, bias, handle)
    return kept


@dataclass(frozen=True)
class _Cast:
    """The parameters of a layer as ComfyUI's cast lends them."""

    weight: Tensor
    """(out_features, in_features), packed, in one of ComfyUI's own formats, or in the dtype of the input."""
    bias: Tensor | None
    """(out_features,), in the dtype of the input. A copy, because ComfyUI may reuse the memory of its own."""
    functions: list[WeightFunction]
    """What is still to apply to a packed weight."""
    handle: object
    """What `host.uncast` takes back."""
    scale: Tensor | None = None
    """The scale of the input, float32, (), where it was measured."""


def _cast(module: comfy.ops.CastWeightBiasOp, like: Tensor, inputs: Inputs | None) -> _Cast:
    """Cast the parameters of a layer as its forward does, and measure the scale of its input where that is needed.

    Args:
        like: as for `projection`, and so are `inputs`.
    """
    host.begin_use()
    functions: list[WeightFunction] = []
    scale = None
    if isinstance(module, GGUFModule):
        weight, bias, functions, handle = module.cast(like)
    elif host_products.multiplies_by_token(module) or (inputs and host_products.needs_input_maximum(module)):
        if inputs and host_products.needs_input_maximum(module):
            maxima = [host_products.smoothed(module, chunk).abs().amax() for chunk in inputs()]
            scale = host_products.measured_scale(module, torch.stack(maxima).amax())
        weight, bias, handle = host_products.cast_quantized(module, like)
    else:
        weight, bias, handle = host.cast(module, like)
        weight = _dequantized(weight)
    return _Cast(weight, None if bias is None else bias.clone(), functions, handle, scale)


def _hold(module: torch.nn.Module, patched: PatchedRows, rows: slice, like: Tensor) -> HeldProduct:
    """Prepare rows of a packed weight as the layer does for all tokens of `like`, (..., tokens, channels)."""
    hold = module.hold if isinstance(module, GGUFOps.Linear) else hold_dense
    return hold(patched, rows, like, like[..., 0].numel())


def _product(module: torch.nn.Module, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Projection:
    """Return the product of the layer with some rows of its weight, (rows, in_features), and of its bias, (rows,)."""
    if host_products.can_be_quantized(module):
        return host_products.with_tensors(module, weight, bias, scale)
    return lambda x: linear(x, weight, bias)


def _dequantized(weight: Tensor) -> Tensor:
    """Return a weight, (rows, columns), dequantized if it is in one of ComfyUI's own formats; others are unchanged."""
    if isinstance(weight, QuantizedTensor) and not is_packed(weight):
        dense: Tensor = weight.dequantize()
        return dense
    return weight


def _kept(module: comfy.ops.CastWeightBiasOp, weight: Tensor, handle: object) -> Tensor:
    """Return a cast weight in memory that ComfyUI does not reuse for other modules."""
    return weight.clone() if host.is_lent(module, weight, handle) else weight
