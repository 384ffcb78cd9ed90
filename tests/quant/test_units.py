"""Numbers with their nouns in messages."""

from __future__ import annotations

from wanquant.quant.units import counted


def test_numbers_with_their_nouns():
    assert [counted(n, "tensor") for n in (0, 1, 2)] == ["0 tensors", "1 tensor", "2 tensors"]
    assert [counted(n, "matrix was", "matrices were") for n in (1, 1000)] == ["1 matrix was", "1000 matrices were"]
