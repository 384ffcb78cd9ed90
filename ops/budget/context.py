"""The memory that a GPU's driver and libraries take for a process, besides the tensors of a model."""

from __future__ import annotations

import torch

from ...quant.device import is_hopper
from ...quant.units import GIB

# The driver reserves local memory for every thread that the GPU can run at the same time.
_BYTES_A_THREAD = 1 << 10
_LIBRARY_BYTES = round(0.5 * GIB)
# The streaming multiprocessors of an RTX 3060, and the threads of each.
_SMALL_GPU = 28 * 1536

# An H100 with hardly any memory left needed 0.13 to 0.29 GiB more than `allocator` gives. This adds 0.24 there. A
# workspace of cuBLAS takes 32 MiB on it and 8 MiB elsewhere. That there are four is assumed, not measured.
_UNSEEN_BYTES = 120 << 20
_WORKSPACE_BYTES, _HOPPER_WORKSPACE_BYTES = 8 << 20, 32 << 20
_WORKSPACES = 4


def context_bytes(device: torch.device) -> int:
    """Return what CUDA's context, kernels and libraries take on a device.

    Measured on an H100: 0.75 GiB while ComfyUI samples (bench/results/gpu-memory-h100.json).

    Args:
        device: where the model will run. The answer for "meta", and for all that are not of NVIDIA, is that for an
            RTX 3060.
    """
    threads = _SMALL_GPU
    if device.type == "cuda" and torch.version.cuda and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device)
        threads = properties.multi_processor_count * properties.max_threads_per_multi_processor
    return _LIBRARY_BYTES + _BYTES_A_THREAD * threads


def unseen_bytes(device: torch.device) -> int:
    """Return what torch's allocator holds besides the tensors that a forward makes.

    These are the workspaces of CUDA's libraries, and what there is between the forwards.

    Args:
        device: as for `context_bytes`.

    Source: aten/src/ATen/cuda/CublasHandlePool.cpp parseChosenWorkspaceSize, torch 2.11.0.
    """
    return _UNSEEN_BYTES + _WORKSPACES * (_HOPPER_WORKSPACE_BYTES if is_hopper(device) else _WORKSPACE_BYTES)
