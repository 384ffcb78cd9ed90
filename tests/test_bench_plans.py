"""The README's picture of memory plans: its bars are those of the committed results."""

from __future__ import annotations

import pytest

from wanquant.bench.plans import PLANS, draw, measured, simulated


@pytest.mark.parametrize("kind", [simulated, measured])
def test_plans_of_a_video_need_less_and_less_memory_at_a_growing_cost(kind):
    bars = kind()
    assert [bar.plan for bar in bars] == [*PLANS] * 2
    for own, *lean in (bars[:3], bars[3:]):
        assert own.cost == 1 and own.peak > lean[0].peak > lean[1].peak
        assert 1 <= lean[0].cost <= lean[1].cost


def test_picture_is_drawn(tmp_path):
    draw(tmp_path / "plans.png")
    assert (tmp_path / "plans.png").stat().st_size > 10_000
