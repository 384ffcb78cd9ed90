"""FactorGains, through which a packed weight is optimized while its integers stay as they are.

All values of a block are linear in its one or two float16 factors. So a gain of each factor is a parameter with an
exact gradient, and the result is written into the same bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..conversion.row_gain import without_factor
from ..formats.bits import read_factor, write_factor
from ..qtype import QuantType


class FactorGains(torch.nn.Module):
    """A packed weight as a function of the gains of its factors, which begin at 1.

    Args:
        packed: uint8, (out_features, bytes per row).
    """

    def __init__(self, qtype: QuantType, packed: Tensor) -> None:
        super().__init__()
        self._qtype, self._packed = qtype, packed
        places = qtype.block.factors
        whole = qtype.dequantize(packed)
        parts = [whole]
        if len(places) == 2:
            # What the scales contribute, and what the minima do.
            scaled = qtype.dequantize(without_factor(packed, qtype, places[1]))
            parts = [scaled, whole - scaled]
        # float32 (factors, rows, blocks, block size)
        self._parts = torch.stack(parts).view(len(parts), len(whole), -1, qtype.block_size)
        self.gains = torch.nn.Parameter(torch.ones_like(self._parts[..., 0]), requires_grad=bool(places))

    def forward(self) -> Tensor:
        """Return the weight under the current gains: float32, (out_features, in_features)."""
        return (self._parts * self.gains[..., None]).sum(0).flatten(1)

    @torch.no_grad()
    def packed(self) -> Tensor:
        """Return the bytes under the current gains: uint8, (out_features, bytes per row)."""
        packed = self._packed.clone()
        blocks = packed.view(-1, self._qtype.type_size)
        for place, gain in zip(self._qtype.block.factors, self.gains, strict=False):
            changed = read_factor(blocks, place) * gain.reshape(-1, 1)
            write_factor(blocks, place, changed.clamp_(-65504.0, 65504.0))
        return packed
