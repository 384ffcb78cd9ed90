"""What data sheets say of the GPUs that benchmarks calculate for."""

from __future__ import annotations

from typing import NamedTuple


class GPU(NamedTuple):
    """The figures of one GPU; those of products are without sparsity."""

    name: str
    capability: int
    multiprocessors: int
    clock_ghz: float
    memory_gb_s: float
    cache_mb: float
    """The size of the second-level cache."""
    tflops: float
    """The speed of products in 16 bits with sums in float32."""
    int8_tops: float


H100 = GPU("H100", 90, 132, 1.98, 3350, 50, 989, 1979)
H200 = GPU("H200", 90, 132, 1.98, 4800, 50, 989, 1979)
RTX_5090 = GPU("RTX 5090", 120, 170, 2.41, 1792, 96, 210, 838)
RTX_4090 = GPU("RTX 4090", 89, 128, 2.52, 1008, 72, 165, 661)
RTX_3060 = GPU("RTX 3060", 86, 28, 1.78, 360, 3, 25.6, 102)
