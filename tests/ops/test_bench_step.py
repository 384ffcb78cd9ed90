"""The benchmark of a sampling step runs, on a small model."""

from __future__ import annotations

import shutil

import torch

from wanquant.bench.step import measure


def test_measures_the_packed_beside_the_dense_model(t2v, tmp_path):
    source = tmp_path / "small.safetensors"
    shutil.copy(t2v[0], source)
    row = measure(source, "Q8_0", torch.Size((1, 16, 1, 8, 8)), 0, None)
    assert row.keys() == {"recipe", "tokens", "seconds", "of_bf16", "collecting"}
    assert row["tokens"] == 16
    assert row["of_bf16"] > 0
