"""The memory that a GPU's driver and libraries take for a process, besides the tensors of a model."""

from __future__ import annotations

import torch

from ...quant.units import GIB

# The driver reserves local memory for every thread that the GPU can run at the same time.
_BYTES_A_THREAD = 1 << 10
_LIBRARY_BYTES = round(0.5 * GIB)
# The streaming multiprocessors of an RTX 3060, and the threads of each.
_SMALL_GPU = 28 * 1536

# An H100 with hardly any memory left needed 0.13 to 0.26 GiB more than `allocator` gives, workspaces included.
_UNSEEN_BYTES = 128 << 20
_HOPPER = 9


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

    These are the workspaces of cuBLAS and of cuBLASLt, small weights that stay on the device, and what comes between
    the forwards.

    Args:
        device: as for `context_bytes`.

    Source: aten/src/ATen/cuda/CublasHandlePool.cpp parseChosenWorkspaceSize, torch 2.11.0.
    """
    is_large = device.type == "cuda" and torch.cuda.is_available() and _capability(device) >= _HOPPER
    return _UNSEEN_BYTES + 2 * ((32 if is_large else 8) << 20)


def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if torch.version.cuda else 0
