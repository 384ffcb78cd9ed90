"""What LoRAs add to a step of Wan 14B with 8-bit products, by counted operations and bytes; simulated, needs no GPU.

The LoRAs are on every quantized layer. The operations and bytes of one block are counted on tensors without data, with
and without them. A GPU's column is what LoRAs take by its data sheet, the time of their operations plus that of their
bytes, over the least time of the block: its operations alone, at full speed. What LoRAs change is made and read in
parts of at most 16 MiB. Where the cache holds two of these, they do not count as memory.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from ..quant.plan.wan_shapes import SIZES
from . import harness
from .gpus import H100, RTX_3060, RTX_4090, RTX_5090

GPUS = (H100, RTX_5090, RTX_4090, RTX_3060)
MODEL, RECIPE, COUNTS = "14B", "Q4_K_M", (1, 2)


def rows() -> list[dict[str, Any]]:
    """Return the share of LoRAs in the operations and bytes of a step, and in its time on each GPU."""
    from ..ops.budget.published import RANK, SMALL, sampling, simulator
    from ..ops.packed.int8 import CHANGE_BYTES

    size, found = SIZES[MODEL], []
    job = sampling(size, SMALL)
    _, _, frames, height, width = job.latent
    tokens = frames * height * width // 4
    without = simulator(size, RECIPE, 0, "int8").peak(job, None)
    attention = 4 * tokens**2 * size.dim
    for loras in COUNTS:
        peak = simulator(size, RECIPE, loras, "int8").peak(job, None)
        flops, nbytes = peak.flops - without.flops, peak.moved_bytes - without.moved_bytes
        written_and_read = 2 * torch.bfloat16.itemsize * flops // (2 * RANK * loras)
        row: dict[str, Any] = {"model": MODEL, "tokens": tokens, "loras": loras, "rank": RANK}
        row |= {"operations": round(flops / without.flops, 5), "bytes": round(nbytes / without.moved_bytes, 5)}
        for gpu in GPUS:
            least = attention / gpu.tflops + (without.flops - attention) / gpu.int8_tops
            cached = written_and_read if gpu.cache_mb * 1e6 >= 2 * CHANGE_BYTES else 0
            added = flops / gpu.tflops + 1e3 * (nbytes - cached) / gpu.memory_gb_s
            row[gpu.name] = round(added / least, 5)
        found.append(row)
    return found


def main() -> None:
    options = harness.arguments(__doc__, update=harness.RESULTS / "lora-int8-simulated.json").parse_args()
    harness.import_comfyui()
    logging.getLogger().setLevel(logging.ERROR)
    found = rows()
    cells = [[value if isinstance(value, int | str) else f"{value:.2%}" for value in row.values()] for row in found]
    harness.conclude(options, {"machine": harness.SIMULATED, "rows": found}, harness.table(list(found[0]), cells))


if __name__ == "__main__":
    main()
