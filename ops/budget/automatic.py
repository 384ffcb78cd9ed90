"""A budget that sets itself: what this process can have of the accelerator's memory when sampling starts."""

from __future__ import annotations

import comfy.model_management
import torch

from ...quant.units import GIB
from .context import context_bytes

AUTOMATIC = 0
"""The budget that stands for `automatic_budget`, in bytes."""


def margin_bytes() -> int:
    """Return what stays free for other processes that grow: ComfyUI's own reserve, which `--reserve-vram` sets."""
    nbytes: int = comfy.model_management.extra_reserved_memory()
    return nbytes


def _free_workspaces() -> None:
    """Give what cuBLAS keeps after its first product back to torch's allocator; the next product takes it again.

    Source: torch/_inductor/cudagraph_trees.py clear_cublass_cache, torch 2.13. Builds for a CPU lack the function.
    """
    getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()


def automatic_budget(device: torch.device) -> int:
    """Return the bytes on `device` that sampling may use, including CUDA's context.

    This is the total memory less what other processes hold, less what this process holds and ComfyUI cannot evict, less
    `margin_bytes`. Workspaces of cuBLAS are freed for it, since `unseen_bytes` counts them as still to come.
    """
    _free_workspaces()
    free: int = comfy.model_management.get_free_memory(device)
    loaded = (entry for entry in comfy.model_management.current_loaded_models if entry.model is not None)
    sizes = (entry.model_loaded_memory() for entry in loaded if entry.device == device)
    evictable = 0 if device.type == "cpu" else sum(sizes)  # what is evicted from main memory stays there
    return max(1, int(free + evictable + context_bytes(device) - margin_bytes()))


def beyond_device(budget: int, device: torch.device) -> list[str]:
    """Return a sentence if a budget, in bytes, is more than the memory of `device`, so that it cannot hold there."""
    total: int = comfy.model_management.get_total_memory(device)
    if budget <= total:
        return []
    return [
        f"the budget is more than the {total / GIB:.2f} GiB of this device, so memory may run out; set budget_gib to 0"
    ]
