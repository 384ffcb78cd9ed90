"""Weights that a block casts, patches and decodes once, and uses for many chunks of tokens."""

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
from ..packed.matmul import DecodedRows, WeightFunction

Projection = Callable[[Tensor], Tensor]
"""(..., in features) -> (..., out features)."""


def is_untouched(module: torch.nn.Module) -> bool:
    """Whether a call does what the module's class says: no hook, no forward put in its place by another node."""
    # The host leaves the class's own behind where it has put another back.
    function = getattr(module.forward, "__func__", None)
    return function is type(module).forward and not (module._forward_hooks or module._forward_pre_hooks)


def is_known_linear(module: torch.nn.Module) -> bool:
    """Whether this is a Linear of ours or of the host, so that its weight may be used without calling it."""
    ours_or_host = isinstance(module, GGUFOps.Linear) or type(module).__module__ == comfy.ops.__name__
    return ours_or_host and is_untouched(module)


def projection(module: comfy.ops.CastWeightBiasOp, like: Tensor) -> Projection:
    """`module` for many chunks of the device and dtype of `like`.

    One that is not known here is called for each chunk, and casts its weight each time.
    """
    if not is_known_linear(module):
        return module  # type: ignore[no-any-return]
    weight, bias, functions, handle = _cast(module, like)
    try:
        if is_packed(weight):
            held = DecodedRows(weight, functions, like).decode(0, like.new_empty(weight.shape))
        else:
            held = _kept(module, weight, handle)
    finally:  # also when memory runs out
        host.uncast(module, weight, bias, handle)
    return lambda x: linear(x, held, bias)


class RowProjection:
    """A known Linear of which some output features are used at a time: of a packed weight, no more are decoded."""

    def __init__(self, module: comfy.ops.CastWeightBiasOp, like: Tensor) -> None:
        weight, self._bias, functions, handle = _cast(module, like)
        self._like, self._weight = like, _kept(module, weight, handle)
        host.uncast(module, weight, self._bias, handle)
        self._decoded = DecodedRows(self._weight, functions, like) if is_packed(weight) else None

    def features(self, features: slice) -> Projection:
        weight, bias = self._rows(features), None if self._bias is None else self._bias[features]
        return lambda x: linear(x, weight, bias)

    def _rows(self, rows: slice) -> Tensor:
        size = rows.stop - rows.start
        if self._decoded and (rows.start % self._decoded.row_multiple or size % self._decoded.row_multiple):
            # A patch that needs the whole weight.
            self._weight = self._decoded.decode(0, self._like.new_empty(self._weight.shape))
            self._decoded = None
        if self._decoded is None:
            return self._weight[rows]
        return self._decoded.decode(rows.start, self._like.new_empty(size, self._weight.shape[1]))


def row_weight(norm: comfy.ops.CastWeightBiasOp, like: Tensor) -> Tensor:
    """The weight of a norm, for the device and dtype of `like`."""
    weight, bias, _, handle = _cast(norm, like)
    kept = _kept(norm, weight, handle)
    host.uncast(norm, weight, bias, handle)
    return kept


def _cast(
    module: comfy.ops.CastWeightBiasOp, like: Tensor
) -> tuple[Tensor, Tensor | None, list[WeightFunction], object]:
    """Weight, bias of its own memory, what is still to do to a packed weight, and the host's handle."""
    host.begin_use()
    if isinstance(module, GGUFModule):
        weight, bias, functions, handle = module.cast(like)
    else:
        weight, bias, handle = host.cast(module, like)
        functions = []
    return weight, None if bias is None else bias.clone(), functions, handle


def _kept(module: comfy.ops.CastWeightBiasOp, weight: Tensor, handle: object) -> Tensor:
    """A cast weight in memory that stays valid when the host casts other modules; decoded if of the host's formats."""
    if isinstance(weight, QuantizedTensor) and not is_packed(weight):
        decoded: Tensor = weight.dequantize()
        return decoded
    as_it_was = weight.dtype == module.weight.dtype and is_packed(weight) == is_packed(module.weight)
    patched = bool(module.weight_function) and not is_packed(weight)
    return weight.clone() if host.is_lent(module, handle) and as_it_was and not patched else weight
