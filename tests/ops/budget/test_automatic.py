"""The automatic budget: what is free, what ComfyUI can evict, and CUDA's context, less a margin."""

from __future__ import annotations

from types import SimpleNamespace

import comfy.model_management
import torch

from wanquant.ops.budget.automatic import automatic_budget, margin_bytes
from wanquant.ops.budget.context import context_bytes
from wanquant.quant.units import GIB

GPU, OTHER, CPU = torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cpu")


def entry(device, nbytes, model=True):
    return SimpleNamespace(model=model or None, device=device, model_loaded_memory=lambda: nbytes)


def test_counts_what_can_be_evicted_from_this_device(monkeypatch):
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device: 3 * GIB)
    loaded = [entry(GPU, 2 * GIB), entry(OTHER, GIB), entry(GPU, GIB, model=False), entry(CPU, GIB)]
    monkeypatch.setattr(comfy.model_management, "current_loaded_models", loaded)
    assert automatic_budget(GPU) == 5 * GIB + context_bytes(GPU) - margin_bytes()
    assert automatic_budget(CPU) == 3 * GIB + context_bytes(CPU) - margin_bytes(), "evicted weights stay there"


def test_workspaces_of_an_earlier_sampling_do_not_count_twice(monkeypatch):
    # A mock: after the first product, torch's allocator holds cuBLAS' workspaces until they are cleared.
    workspaces = [GIB // 8]
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", workspaces.clear, raising=False)
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device: 3 * GIB - sum(workspaces))
    monkeypatch.setattr(comfy.model_management, "current_loaded_models", [])
    assert automatic_budget(GPU) == 3 * GIB + context_bytes(GPU) - margin_bytes()


def test_the_margin_is_that_of_the_command_line(monkeypatch):
    monkeypatch.setattr(comfy.model_management, "EXTRA_RESERVED_VRAM", 7)
    assert margin_bytes() == 7


def test_is_positive_where_nothing_is_left(monkeypatch):
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device: 0)
    monkeypatch.setattr(comfy.model_management, "EXTRA_RESERVED_VRAM", 9 * GIB)
    assert automatic_budget(GPU) == 1
