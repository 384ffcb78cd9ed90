"""IQ4: `pack_*` writes the fields where ggml reads them."""

from __future__ import annotations

import numpy as np
import torch

from wanquant.quant import QTYPES
from wanquant.quant.formats.iq4 import KVALUES, pack_iq4_nl, pack_iq4_xs
from wanquant.testing.libggml import LibGGML
from wanquant.tests.quant.samples import assert_same_bits

N = 50
RNG = np.random.default_rng(0)
D = torch.from_numpy(RNG.standard_normal(N).astype(np.float16).astype(np.float32))
CODEBOOK = torch.tensor(KVALUES, dtype=torch.float32)


def test_packed_iq4_nl_blocks_dequantize_to_their_fields(libggml: LibGGML) -> None:
    codes = torch.from_numpy(RNG.integers(0, 16, (N, 32)))
    packed = pack_iq4_nl(D, codes)
    expected = (D[:, None] * CODEBOOK[codes]).numpy()
    assert_same_bits(libggml.dequantize("IQ4_NL", packed.numpy()), expected)
    assert_same_bits(QTYPES["IQ4_NL"].dequantize_blocks(packed).numpy(), expected)


def test_packed_iq4_xs_blocks_dequantize_to_their_fields(libggml: LibGGML) -> None:
    codes, scales = torch.from_numpy(RNG.integers(0, 16, (N, 256))), torch.from_numpy(RNG.integers(-32, 32, (N, 8)))
    packed = pack_iq4_xs(D, scales, codes)
    expected = ((D[:, None] * scales)[:, :, None] * CODEBOOK[codes].view(N, 8, 32)).view(N, 256).numpy()
    assert_same_bits(libggml.dequantize("IQ4_XS", packed.numpy()), expected)
    assert_same_bits(QTYPES["IQ4_XS"].dequantize_blocks(packed).numpy(), expected)
