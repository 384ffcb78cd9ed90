"""The peak of encoding a prompt, by the host's umT5 in its true size."""

from __future__ import annotations

from wanquant.bench.graph_memory import TOKENS, encoding_peak
from wanquant.quant.units import GIB


def test_text_encoding_fits_the_smallest_budget_of_14b():
    peak = encoding_peak()
    layer, norms = 10240 * 4096 * 34 // 32, 49 * 4096 * 4
    assert peak.weight_bytes == 2 * layer + norms
    assert peak.scratch_bytes <= 64 << 20  # a tile, whatever the layer
    assert peak.activation_bytes >= 3 * TOKENS * 10240 * 4  # the gated FFN's
    assert peak.total_bytes < 1.95 * GIB
