"""How a conversion encodes a weight: for the inputs of its layer, as far as they are known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..encoders.search import Encoder, encode_with_feedback
from ..qtype import Effort, QuantType, weights_at_a_time
from ..statistics.calibration import Calibration
from .row_gain import emphasis, restore_gain

# Bits a weight. With more, feedback makes up for what scales of least squared error cut (TinyWan: 0.5 dB in Q4_K_M).
_COARSE = 3


class Inputs(NamedTuple):
    """What is known of the inputs of a layer, and how its weight is encoded for them."""

    importance: Tensor | None = None
    """(columns,) mean squares."""
    feedback: Tensor | None = None
    """(columns / span, span, span), of `Calibration.feedback`; never without importance."""

    @classmethod
    def of(cls, importance: Mapping[str, Tensor], name: str) -> Inputs:
        if name not in importance:
            return cls()
        return cls(importance[name], importance.inverse_factor(name) if isinstance(importance, Calibration) else None)

    def to(self, device: torch.device) -> Inputs:
        return Inputs(*(None if values is None else values.to(device, torch.float32) for values in self))

    def quantize(self, qtype: QuantType, weight: Tensor, effort: Effort = "best") -> Tensor:
        """Like `QuantType.quantize` for (rows, columns), but at its best with rows as strong as they were.

        With feedback, and a type that has a search, it is for the least error of the outputs, whose strength comes with
        it, at either effort.
        """
        encode = qtype.best
        if not isinstance(encode, Encoder) or (effort == "fast" and self.feedback is None):
            return qtype.quantize(weight, self.importance, effort)
        parts = torch.split(weight.float(), max(1, weights_at_a_time(weight.device) // weight.shape[-1]))
        return torch.cat([self._encode(encode, qtype, part) for part in parts])

    def _encode(self, encode: Encoder, qtype: QuantType, weight: Tensor) -> Tensor:
        weights = emphasis(weight, self.importance)
        if self.importance is not None and self.feedback is not None:
            if qtype.bits_per_weight > _COARSE:
                weights = self.importance.expand_as(weight)
            return encode_with_feedback(encode, qtype.block_size, weight, weights, self.feedback)
        blocks = weight.reshape(-1, qtype.block_size)
        packed = encode(blocks, weights.view_as(blocks)).view(len(weight), -1)
        return restore_gain(qtype, packed, weight, self.importance)
