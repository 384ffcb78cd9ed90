"""Weights that a block casts, patches and decodes once, and uses for many chunks of tokens."""

from __future__ import annotations

from collections.abc import Callable

import comfy.ops
import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor
from torch.nn.functional import linear

from ...quant.kernels.op import dequantize_into
from ..layout import dense, is_packed
from ..linear import GGUFOps

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
    weight, bias = hold(module, like)
    return lambda x: linear(x, weight, bias)


class RowProjection:
    """A known Linear of which some output features are used at a time: of a packed weight, no more are decoded."""

    def __init__(self, module: comfy.ops.CastWeightBiasOp, like: Tensor) -> None:
        self._weight, self._bias = hold(module, like, packed=True)
        self._like = like

    def features(self, features: slice) -> Projection:
        weight, bias = self._rows(features), None if self._bias is None else self._bias[features]
        return lambda x: linear(x, weight, bias)

    def _rows(self, rows: slice) -> Tensor:
        if not is_packed(self._weight):
            return self._weight[rows]
        packed: QuantizedTensor = self._weight
        out = self._like.new_empty(rows.stop - rows.start, packed.shape[1])
        dequantize_into(packed._qdata[rows], packed.params.qtype, out)
        return out


def hold(module: comfy.ops.CastWeightBiasOp, like: Tensor, *, packed: bool = False) -> tuple[Tensor, Tensor | None]:
    """Weight and bias for the device and dtype of `like`, which stay valid while other modules are cast.

    Args:
        module: one of the host's that cast their weight at every use.
        packed: leave packed blocks packed, where no LoRA needs them decoded.
    """
    comfy.ops.run_every_op()
    weight, bias, stream = comfy.ops.cast_bias_weight(module, like, offloadable=True, compute_dtype=like.dtype)
    held = weight if packed and is_packed(weight) else _plain(weight, like.dtype)
    if held is weight and _is_lent(module, weight, stream):
        held = weight.clone()
    held_bias = None if bias is None else bias.clone()
    comfy.ops.uncast_bias_weight(module, weight, bias, stream)
    return held, held_bias


def _plain(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Decoded, whether it is packed in our layout or in one of the host's own."""
    decoded = dense(weight, dtype)
    return decoded.dequantize() if isinstance(decoded, QuantizedTensor) else decoded


def _is_lent(module: comfy.ops.CastWeightBiasOp, weight: Tensor, stream: tuple[object, ...] | None) -> bool:
    """Whether a cast weight lies in a buffer or page that the host takes back with the next casts."""
    computed = module.weight_function or weight.dtype != module.weight.dtype
    return not computed and (hasattr(module, "_v") or (stream is not None and stream[0] is not None))
