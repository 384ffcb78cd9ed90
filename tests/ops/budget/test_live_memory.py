"""The count of memory equals torch's own profile of real tensors, and is the same for meta tensors."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from wanquant.ops.budget import live_memory, operations
from wanquant.ops.budget.live_memory import LiveMemory
from wanquant.ops.budget.operations import run
from wanquant.quant import QTYPES
from wanquant.quant.torch_op import dequantize_into


def mlp(device):
    """Return a function with views, in-place operations, several outputs and temporaries."""
    x, a, b = (torch.ones(64, 64, device=device) for _ in range(3))

    def run():
        y = torch.nn.functional.layer_norm(x @ a, (64,))
        y.t().add_(1)
        parts = [torch.relu(part) for part in y.split(16)]
        return torch.cat(parts) @ b

    return run


def profiled_peak(run):
    """Return the peak in bytes that torch's allocator reports."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@torch.no_grad()
def test_counts_what_the_allocator_does():
    run = mlp("cpu")
    run()
    with LiveMemory("cpu") as memory:
        out = run()
    assert memory.now.nbytes == out.nbytes == 16384
    assert 0 <= memory.peak.nbytes - profiled_peak(run) <= 5 * 512
    del out
    assert memory.now.nbytes == 0


@torch.no_grad()
def test_meta_tensors_count_as_real_ones():
    histories = []
    for device in ("cpu", "meta"):
        with LiveMemory(device, record=True) as memory:
            mlp(device)()
            mlp(device)()
        histories.append(memory.history)
    assert histories[0] == histories[1]
    assert histories[0][-1].flops == 2 * 2 * 2 * 64**3


def test_operations_that_are_alike_are_run_once(monkeypatch):
    known, runs = operations.MetaOperations(), []
    monkeypatch.setattr(live_memory, "_META_OPERATIONS", known)
    monkeypatch.setattr(operations, "run", lambda func, *args: runs.append(func) or run(func, *args))
    counts = []
    for _ in range(2):
        with LiveMemory("meta") as memory:
            mlp("meta")()
        counts.append((len(runs), memory.peak, memory.now.flops, memory.moved_bytes))
    assert counts[0] == counts[1]
    monkeypatch.setattr(operations, "_MOST_KNOWN", 3)
    for size in range(9):
        known(torch.ops.aten.neg.default, (torch.empty(size, device="meta"),), {})
    assert len(known._known) <= 3, "it does not grow without end"


def test_a_view_that_torch_does_not_declare_allocates_nothing():
    tensor = torch.empty(8, 8, device="meta")
    with LiveMemory("meta") as memory:
        views = [torch.ops.aten._unsafe_view(tensor, [64]) for _ in range(2)]
    assert len(views) == 2 and memory.now.nbytes == 0


def test_dequantized_weights_are_scratch():
    q8_0 = QTYPES["Q8_0"]
    packed = torch.empty(q8_0.packed_shape((16, 64)), dtype=torch.uint8, device="meta")
    with LiveMemory("meta") as memory:
        whole = q8_0.dequantize(packed)
        tile = torch.empty(8, 64, device="meta")
        dequantize_into(packed[:8], "Q8_0", tile)
        activation = torch.empty(100, device="meta")
    assert memory.now[1:] == (512, whole.nbytes + tile.nbytes)
    assert activation.nbytes == 400


@pytest.mark.parametrize("write", [lambda t: t.add_(1), lambda t: torch.mm(t, t, out=t.new_empty(8, 8))])
def test_writing_to_an_argument_allocates_nothing(write):
    tensor = torch.empty(8, 8, device="meta")
    with LiveMemory("meta") as memory:
        write(tensor)
        write(tensor)
    assert memory.now.nbytes == 0
