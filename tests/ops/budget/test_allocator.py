"""The model of the allocator, by hand and against what an H100's allocator held."""

from __future__ import annotations

import json

import pytest

from wanquant.ops.budget.allocator import Allocator, Event, most_held_bytes
from wanquant.ops.budget.published import simulator
from wanquant.ops.budget.sampling_job import SamplingJob
from wanquant.quant.plan.wan_shapes import SIZES
from wanquant.quant.units import GIB
from wanquant.testing.hosts import ROOT

MIB = 1 << 20


def held(*events: tuple[int, int | None]) -> float:
    return most_held_bytes(Event(tensor, mib and mib * MIB) for tensor, mib in events) / MIB


def test_a_freed_range_serves_smaller_tensors():
    assert held((1, 100), (1, None), (2, 60), (3, 40)) == 100


def test_ranges_do_not_join():
    """Half of each of two ranges is free, and a tensor keeps each from going back."""
    halves = (1, 80), (2, 80), (1, None), (3, 40), (4, 40), (2, None), (5, 40), (6, 40), (4, None), (6, None)
    assert held(*halves, (7, 60)) == 220
    assert held(*halves, (7, 40), (8, 40)) == 160


def test_neighbors_within_a_range_join():
    allocator = Allocator()
    allocator.allocate(1, 100 * MIB)
    allocator.release(1)
    for tensor in (2, 3, 4):
        allocator.allocate(tensor, 30 * MIB)
    for tensor in (2, 4, 3):
        allocator.release(tensor)
    allocator.allocate(5, 100 * MIB)
    assert allocator.held_bytes == allocator.most_held_bytes == 100 * MIB


def test_whole_ranges_go_back_before_another_is_taken():
    assert held((1, 100), (1, None), (2, 110)) == 110
    assert held((1, 100), (1, None), (2, 20), (3, 110)) == 210


def test_the_tensors_that_are_left_after_a_step_are_released():
    assert held((1, 100), (2, 3)) == 104, "ranges are multiples of 2 MiB"
    assert held((1, 0), (1, None)) == 0


@pytest.mark.parametrize(("width", "height"), [(832, 480), (1280, 720)])
def test_what_an_h100_held(width, height):
    """ComfyUI's own forward of 14B with dynamic VRAM: weights lie outside torch's allocator."""
    rows = json.loads((ROOT / "bench" / "results" / "gpu-memory-h100.json").read_text())["rows"]
    measured = next(
        row["reserved_gib"]
        for row in rows
        if row["is_dynamic"] and row["plan"] == "stock" and row.get("precision") != "int8" and row["width"] == width
    )
    peak = simulator(SIZES["14B"], "Q4_K_M").peak(SamplingJob.for_video(width, height, 81), None)
    assert 0.93 < peak.held_bytes / GIB / measured < 1.02
