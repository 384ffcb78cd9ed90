"""The memory that a GPU's driver and libraries take for a process, besides its tensors."""

from __future__ import annotations

import torch

from ...quant.units import GIB

# The driver reserves local memory for every thread that the GPU can run at the same time.
_BYTES_A_THREAD = 1 << 10
_LIBRARY_BYTES = round(0.5 * GIB)
# The streaming multiprocessors of an RTX 3060, and the threads of each.
_SMALL_GPU = 28 * 1536


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
