"""What a file costs to encode, from a sample of its weights on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from ..conversion.stream import Stream
from ..plan.layer_error import sampled_type
from ..plan.recipe import StoredType
from ..sources.tensors import sample_rows

# A hundredth to half a second of one core, by type.
_SAMPLED_WEIGHTS = 1 << 16
# Types that are converted rather than encoded.
_PLAIN = ("F32", "F16", "BF16")
_PLAIN_SECONDS_A_WEIGHT = 3e-9


class Rates:
    """The seconds per weight of each type, measured when it is first asked for.

    All models share them: for a plan, their weights are alike.
    """

    def __init__(self) -> None:
        self._of: dict[str, float] = {}

    def seconds(self, stream: Stream, types: Mapping[str, StoredType]) -> float:
        """Return the time that encoding tensors needs.

        Args:
            stream: of their source and settings.
            types: the types by tensor name.
        """
        tensors = stream.checkpoint.tensors
        return sum(math.prod(tensors[name].shape) * self._rate(stream, name, stored) for name, stored in types.items())

    def _rate(self, stream: Stream, name: str, stored: StoredType) -> float:
        if stored.name in _PLAIN:
            return _PLAIN_SECONDS_A_WEIGHT
        if stored.name not in self._of:
            tensor = stream.checkpoint.tensors[name]
            rows = sample_rows(tensor, max(1, _SAMPLED_WEIGHTS // tensor.shape[-1])).to(stream.device)
            qtype = sampled_type(stored, rows)
            encoder = stream.encoders.of(name, stored, None)
            encoder.quantize(qtype, rows[:1] if stored is qtype else rows, stream.settings.effort)  # loads libraries
            started = time.process_time()
            encoder.quantize(qtype, rows, stream.settings.effort)
            self._of[stored.name] = (time.process_time() - started) / rows.numel()
        return self._of[stored.name]
