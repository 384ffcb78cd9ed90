"""Sentences on a conversion."""

from __future__ import annotations

from types import SimpleNamespace

from wanquant.quant import QTYPES
from wanquant.quant.conversion.notes import notes_on
from wanquant.quant.plan.recipe import TypePlan


def test_numbers_of_a_resumed_conversion_say_what_they_leave_out():
    plan = TypePlan({"a": QTYPES["Q4_K"], "b": QTYPES["Q4_K"]}, ())
    stream = SimpleNamespace(biases={}, encoders=SimpleNamespace(rounded={("b", "Q4_K")}, plainer=set()))
    counts = "1 matrix was rounded for the least error of the layers' outputs"
    assert notes_on(stream, plan) == (counts,)
    left_out = "1 tensor was kept from an unfinished conversion; the numbers of matrices are those of the others"
    assert notes_on(stream, plan, kept=1) == (counts, left_out)
    stream.encoders.rounded.clear()
    assert notes_on(stream, plan, kept=2) == ()
