"""The encoder of one layer's weight, which knows the statistics of the layer's inputs.

`QuantType.quantize` minimizes the squared error of the weights. A conversion wants the outputs of the layer to have the
least error. At effort "best", a `LayerEncoder` uses all that is known of the inputs:

- nothing: it searches for the least squared error, then restores the gain of each row (see `row_gain`);
- an importance matrix: it does the same, and weights each squared error by the mean square of its input channel;
- a calibration: it rounds the weights for the least error of the outputs, so that their errors make up for each other
  (`encoders/rounding`). Effort "thorough" tries more of these roundings. A layer for which that does not help on
  tokens that were held out is encoded with the importance matrix: see `LayerEncoder.tried`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..device import elements_at_a_time, one_thread
from ..encoders.native import RoundingForOutputs
from ..encoders.rounding import BEST, THOROUGH, Moments, round_for_outputs
from ..encoders.search import SearchEncoder
from ..native.layer_type import LayerType, type_name
from ..native.native_format import ROUNDED_ELEMENTS
from ..native.registry import NATIVE
from ..native.rotation import rotate
from ..plan.recipe import StoredType
from ..qtype import QTYPES, Effort, QuantType
from ..statistics.calibration import Calibration, SecondMoments
from ..statistics.importance import Importance
from .damping import damped, is_clearly_less
from .row_gain import error_weights, restore_gain, restore_gain_of_layer

# In bits per weight. Up to here, scales are chosen with `error_weights` also if there is a calibration. With more bits,
# the compensation already makes up for large weights that are cut (TinyWan: 0.5 dB in Q4_K_M).
_COARSE = 3
# Counts how often the bytes of calibrated files have changed since version 0.1.0.
_CALIBRATED_REVISION = 1
# The same for tuned files, which are rounded like calibrated ones and came with their revision 1. It is 1 more for each
# change of the tuning itself.
_TUNED_REVISION = _CALIBRATED_REVISION - 1
# The same for weights in ComfyUI's formats that are rounded for the outputs of their layers.
_NATIVE_ROUNDED_REVISION = 1


def revisions_today(importance: Mapping[str, Tensor] | None, *, tuned: bool = False) -> dict[str, int]:
    """Return the revision that the encoder of each type has in this version of the pack.

    Args:
        importance: what is known of the inputs, any float dtype, (in_features,) by the name of the weight.
        tuned: whether the file is tuned block by block.
    """
    calibrated = _CALIBRATED_REVISION if isinstance(importance, Calibration) else 0
    rounded = _TUNED_REVISION if tuned else calibrated
    ggml = {
        name: qtype.revision + (rounded if isinstance(qtype.best, SearchEncoder) else 0)
        for name, qtype in QTYPES.items()
    }
    native = {
        type_name(native): native.revision
        + (_NATIVE_ROUNDED_REVISION if isinstance(importance, Calibration) or (importance and native.rotates) else 0)
        for native in NATIVE.values()
    }
    return ggml | native


class LayerEncoder(NamedTuple):
    """An encoder of one layer's weight, and what is known of the layer's inputs."""

    importance: Tensor | None = None
    """float32, (in_features,): the mean square of each input channel, or its variance if there is a `mean`."""
    moments: Moments | None = None
    """The second moments of the inputs; requires `importance`."""
    held_out: Tensor | None = None
    """float32, (tokens, in_features): inputs that `moments` was not measured on."""
    mean: Tensor | None = None
    """float32, (in_features,): the mean of each input channel, if the layer's bias makes up for what it leads to."""
    rotated: bool = False
    """Whether importance and moments are those of rotated inputs."""

    @classmethod
    @one_thread()
    def of(
        cls, importance: Mapping[str, Tensor], name: str, *, has_bias: bool = False, rotated: bool = False
    ) -> LayerEncoder:
        """Return the encoder of a weight.

        Args:
            importance: the mean square of each input channel by name, floating point (in_features,). It may be a
                calibration, and may lack the name.
            name: the name of the weight.
            has_bias: whether the layer has a bias, which can make up for the mean of its inputs.
            rotated: whether to encode for a format that rotates its inputs. Rotated inputs are correlated even if the
                inputs are not, so that importance alone gives moments, too.

        Raises:
            QuantError: a calibration's moments are not positive definite.
        """
        if name not in importance:
            return cls()
        mean = importance.mean(name) if has_bias and isinstance(importance, Importance) else None
        squares = importance[name] if mean is None else (importance[name] - mean.square()).clamp(min=0)
        label = f"{importance.name if isinstance(importance, Importance) else 'importance'}: tensor {name}"
        if not isinstance(importance, Calibration):
            if not rotated:
                return cls(squares, mean=mean)
            second = SecondMoments.of_uncorrelated(squares).rotated()
            return cls(second.diagonal().float(), damped(second, None, label), None, mean, rotated)
        held_out = importance.held_out.get(name)
        if held_out is not None:
            held_out = held_out.float() if mean is None else held_out.float() - mean
        second, tokens = importance.moments(name, centered=mean is not None), held_out
        if rotated:
            second, tokens = second.rotated(), None if held_out is None else rotate(held_out)
            squares = second.diagonal().float().clamp(min=0)
        moments = damped(second, tokens, label, None if mean is None else importance[name])
        return cls(squares, moments, held_out, mean, rotated)

    def to(self, device: torch.device) -> LayerEncoder:
        """Return this encoder with its tensors on `device`."""
        importance, held_out, mean = (
            None if values is None else values.to(device, torch.float32)
            for values in (self.importance, self.held_out, self.mean)
        )
        moments = None if self.moments is None else self.moments.to(device)
        return LayerEncoder(importance, moments, held_out, mean, self.rotated)

    def tried(self, qtype: StoredType, rows: Tensor) -> LayerEncoder:
        """Return this encoder, without the moments if rounding with them does not help on the held-out tokens.

        Args:
            rows: float32 (rows, in_features), some rows of the weight.
        """
        plain = self._replace(moments=None)
        if self.moments is None or self.held_out is None:
            return self
        if isinstance(qtype, LayerType):
            qtype = LayerType(qtype.format, (len(rows), rows.shape[1]))
        elif not isinstance(qtype.best, SearchEncoder):
            return self
        error, without = (qtype.dequantize(encoder.quantize(qtype, rows)) - rows for encoder in (self, plain))
        return self if is_clearly_less(error, without, self.held_out) else plain

    def quantize(self, qtype: StoredType, weight: Tensor, effort: Effort = "best") -> Tensor:
        """Quantize the weight like `QuantType.quantize`, but for the least error of the layer's outputs.

        Without a calibration, effort "fast" is the same as `QuantType.quantize`. So are types without a search.

        Args:
            qtype: the type to quantize to.
            weight: floating point, (out_features, in_features), on the device of the statistics.
            effort: with a calibration, "fast" searches as "best" does. Without one, "thorough" is the same as "best".

        Returns:
            uint8, (out_features, bytes per row), on the same device.
        """
        if isinstance(qtype, LayerType):
            rounding = self._rounding(qtype, effort)
            packed = qtype.quantize(weight, self.importance, effort, rounding)
            if rounding is not None or effort == "fast":
                return packed
            return restore_gain_of_layer(qtype, packed, weight, None if qtype.format.rotates else self.importance)
        encoder = qtype.best
        if not isinstance(encoder, SearchEncoder) or (effort == "fast" and self.moments is None):
            return qtype.quantize(weight, self.importance, effort)
        at_a_time = elements_at_a_time(weight.device)
        if self.moments is not None:
            at_a_time = max(at_a_time, ROUNDED_ELEMENTS)
        parts = torch.split(weight.float(), max(1, at_a_time // weight.shape[-1]))
        return torch.cat([self._encode(encoder, qtype, part, effort) for part in parts])

    def rounds(self, qtype: StoredType) -> bool:
        """Return whether weights of a type are rounded for the outputs of the layer."""
        if isinstance(qtype, LayerType):
            return self._rounding(qtype, "best") is not None
        return self.moments is not None and isinstance(qtype.best, SearchEncoder)

    def _rounding(self, qtype: LayerType, effort: Effort) -> RoundingForOutputs | None:
        """Return what rounds a weight in one of ComfyUI's formats, or None without moments that suit the format."""
        if self.importance is None or self.moments is None:
            return None
        assert self.rotated == qtype.format.rotates, f"moments of other inputs than those of {qtype.name}"
        rounding = RoundingForOutputs(self.importance, self.moments, THOROUGH if effort == "thorough" else BEST)
        return rounding if rounding.takes(qtype.format) else None

    def _encode(self, encoder: SearchEncoder, qtype: QuantType, weight: Tensor, effort: Effort) -> Tensor:
        weighting = error_weights(weight, self.importance)
        if self.importance is not None and self.moments is not None:
            if qtype.bits_per_weight > _COARSE:
                weighting = self.importance.expand_as(weight)
            how = THOROUGH if effort == "thorough" else BEST
            return round_for_outputs(encoder, qtype.block_size, weight, weighting, self.moments, how)
        blocks = weight.reshape(-1, qtype.block_size)
        packed = encoder(blocks, weighting.view_as(blocks)).view(len(weight), -1)
        return restore_gain(qtype, packed, weight, self.importance)


class LayerEncoders:
    """The encoders of all weights of one pass, one weight after the other.

    Args:
        biases: the names of the weights whose layers have a bias that is corrected.
    """

    def __init__(
        self, importance: Mapping[str, Tensor], biases: Collection[str], device: torch.device, effort: Effort
    ) -> None:
        self._importance, self._biases, self._device = importance, biases, device
        self._is_fast = effort == "fast" and not isinstance(importance, Calibration)
        self._name = ""
        self._encoders: dict[bool, LayerEncoder] = {}
        self._tried: dict[str, LayerEncoder] = {}
        self.rounded: set[tuple[str, str]] = set()
        """The names and types of the weights that are rounded for the outputs of their layers."""
        self.plainer: set[tuple[str, str]] = set()
        """The names and types of the weights for which the moments did not help: see `LayerEncoder.tried`."""

    def of(self, name: str, qtype: StoredType, rows: Tensor | None) -> LayerEncoder:
        """Return the encoder of a weight in one type.

        Args:
            rows: float32 (rows, in_features), to try it on; None after the first slice of the weight.
        """
        if name != self._name:
            self._name, self._encoders, self._tried = name, {}, {}
        if qtype.name not in self._tried:
            whole = self._encoder(qtype)
            encoder = whole if rows is None else whole.tried(qtype, rows)
            self._tried[qtype.name] = encoder
            if encoder.moments is not whole.moments:
                self.plainer.add((name, qtype.name))
            elif encoder.rounds(qtype):
                self.rounded.add((name, qtype.name))
        return self._tried[qtype.name]

    def _encoder(self, qtype: StoredType) -> LayerEncoder:
        """Return the encoder of the current weight for the inputs that a type gets: rotated ones or not."""
        rotated = isinstance(qtype, LayerType) and qtype.format.rotates and not self._is_fast
        if rotated not in self._encoders:
            has_bias = self._name in self._biases
            encoder = LayerEncoder.of(self._importance, self._name, has_bias=has_bias, rotated=rotated)
            self._encoders[rotated] = encoder.to(self._device)
        return self._encoders[rotated]
