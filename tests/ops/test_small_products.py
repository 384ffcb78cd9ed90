"""The benchmark of products of few rows runs, on a small weight, and ggml's product is one of the same weight."""

from __future__ import annotations

import torch

from wanquant.quant import QTYPES
from wanquant.research import small_products


def test_measures_every_way(monkeypatch):
    monkeypatch.setattr(small_products, "SIZE", 256)
    row = small_products.measure("Q4_K", 1, 0)
    assert list(row) == ["type", "tokens", "tile_64_mib", "tile_1_mib", "dense", "vec_dot"]
    assert "vec_dot" not in small_products.measure("Q4_K", 3, 0)


def test_dot_product_of_blocks_is_near_the_exact_one(monkeypatch, sqnr):
    monkeypatch.setattr(small_products, "SIZE", 256)
    packed, x = QTYPES["Q4_K"].quantize(torch.randn(256, 256), effort="fast"), torch.randn(256)
    assert sqnr(QTYPES["Q4_K"].dequantize(packed) @ x, small_products.vec_dot(QTYPES["Q4_K"], packed, x)()) > 35
