"""The encoder of one layer's weight, which knows the statistics of the layer's inputs.

`QuantType.quantize` minimizes the squared error of the weights. A conversion wants the outputs of the layer to have the
least error. At effort "best", a `LayerEncoder` uses all that is known of the inputs:

- nothing: it searches for the least squared error, then restores the gain of each row (see `row_gain`);
- an importance matrix: it does the same, and weights each squared error by the mean square of its input channel;
- a calibration: it rounds the weights for the least error of the outputs, so that their errors make up for each other
  (`encoders/rounding`). Effort "thorough" tries more of these roundings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..encoders.rounding import BEST, THOROUGH, Moments, round_for_outputs
from ..encoders.search import SearchEncoder
from ..qtype import QTYPES, Effort, QuantType, elements_at_a_time
from ..statistics.calibration import Calibration
from .row_gain import error_weights, restore_gain

# In bits per weight. Up to here, scales are chosen with `error_weights` also if there is a calibration. With more bits,
# the compensation already makes up for large weights that are cut (TinyWan: 0.5 dB in Q4_K_M).
_COARSE = 3
# The rounding works on one channel of all rows at a time, so that it needs more rows than a search.
_ROUNDED_ELEMENTS = 1 << 20
# Counts how often the bytes of calibrated files have changed since version 0.1.0.
_CALIBRATED_REVISION = 1


def revisions_today(importance: Mapping[str, Tensor] | None) -> dict[str, int]:
    """Return the revision that the encoder of each type has in this version of the pack.

    Args:
        importance: what is known of the inputs, any float dtype, (in_features,) by the name of the weight.
    """
    calibrated = _CALIBRATED_REVISION if isinstance(importance, Calibration) else 0
    return {
        name: qtype.revision + (calibrated if isinstance(qtype.best, SearchEncoder) else 0)
        for name, qtype in QTYPES.items()
    }


class LayerEncoder(NamedTuple):
    """An encoder of one layer's weight, and what is known of the layer's inputs."""

    importance: Tensor | None = None
    """float32, (in_features,): the mean square of each input channel."""
    moments: Moments | None = None
    """The second moments of the inputs, from `Calibration.moments`; requires `importance`."""

    @classmethod
    def of(cls, importance: Mapping[str, Tensor], name: str) -> LayerEncoder:
        """Return the encoder of the weight `name`; `importance` may be a calibration, and may lack the name."""
        if name not in importance:
            return cls()
        return cls(importance[name], Moments(importance.moments(name)) if isinstance(importance, Calibration) else None)

    def to(self, device: torch.device) -> LayerEncoder:
        """Return this encoder with its tensors on `device`."""
        importance = None if self.importance is None else self.importance.to(device, torch.float32)
        return LayerEncoder(importance, None if self.moments is None else self.moments.to(device))

    def quantize(self, qtype: QuantType, weight: Tensor, effort: Effort = "best") -> Tensor:
        """Quantize the weight like `QuantType.quantize`, but for the least error of the layer's outputs.

        Without a calibration, effort "fast" is the same as `QuantType.quantize`. So are types without a search.

        Args:
            qtype: the type to quantize to.
            weight: floating point, (out_features, in_features), on the device of the statistics.
            effort: with a calibration, "fast" searches as "best" does. Without one, "thorough" is the same as "best".

        Returns:
            uint8, (out_features, bytes per row), on the same device.
        """
        encoder = qtype.best
        if not isinstance(encoder, SearchEncoder) or (effort == "fast" and self.moments is None):
            return qtype.quantize(weight, self.importance, effort)
        at_a_time = elements_at_a_time(weight.device)
        if self.moments is not None:
            at_a_time = max(at_a_time, _ROUNDED_ELEMENTS)
        parts = torch.split(weight.float(), max(1, at_a_time // weight.shape[-1]))
        return torch.cat([self._encode(encoder, qtype, part, effort) for part in parts])

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
