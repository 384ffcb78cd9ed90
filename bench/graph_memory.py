"""Peak video memory before and after sampling: umT5-XXL encoding a prompt, and the VAE decoding in tiles.

It is simulated on meta tensors as in `bench memory`, for the same budgets, and needs no GPU. The weights of the text
encoder are Q8_0 and streamed; its embedding stays in main memory, and ComfyUI computes in float32. Where ComfyUI runs
the text encoder on the CPU, it needs no video memory. The VAE's weights are on the GPU, or streamed where no tile fits
beside them.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from . import harness
from .memory import CASES, MODELS, Video

if TYPE_CHECKING:
    from ..ops.budget.simulator import Peak

TOKENS = 512
Row = dict[str, object]


def encoding_peak() -> Peak:
    """Return the peak of encoding one prompt, which ComfyUI pads to 512 tokens."""
    import comfy.text_encoders.t5
    import comfy.text_encoders.wan
    import torch

    from ..ops.budget.live_memory import LiveMemory
    from ..ops.budget.meta_wan import META, meta_packed
    from ..ops.budget.simulator import Peak
    from ..ops.packed.linear import GGUFOps, gguf_modules
    from ..quant import QTYPES

    config = json.loads(Path(comfy.text_encoders.wan.__file__).with_name("umt5_config_xxl.json").read_text())
    model = comfy.text_encoders.t5.T5(config, torch.float32, META, GGUFOps).requires_grad_(False)
    streamed = [0, 0]
    for key, module in gguf_modules(model):
        weight = meta_packed(key, module._shapes["weight"], QTYPES["Q8_0"], torch.float32)
        module.weight = torch.nn.Parameter(weight, requires_grad=False)
        if isinstance(module, GGUFOps.Linear):
            streamed.append(weight.nbytes)
    norms = [parameter for name, parameter in model.named_parameters() if name.endswith("layer_norm.weight")]
    memory = LiveMemory(META)
    with torch.inference_mode(False), torch.no_grad(), memory:
        tokens = torch.zeros(1, TOKENS, dtype=torch.long, device=META)
        model(tokens, attention_mask=torch.ones(1, TOKENS, device=META))
    weights = sum(sorted(streamed)[-2:]) + sum(norm.nbytes for norm in norms)
    return Peak.of(memory, weights)


def rows() -> list[Row]:
    import torch

    from ..ops.budget.sampling_job import SamplingJob
    from ..ops.budget.vae_tiles import tiles_within

    found = [row("umT5-XXL", None, None, encoding_peak())]
    for model, vae in (("14B-T2V", "Wan 2.1 VAE"), ("5B-TI2V", "Wan 2.2 VAE")):
        for video, budget in CASES[model]:
            job = SamplingJob.for_video(*video, channels=MODELS[model].out_dim)
            tiles = tiles_within(job, round(budget * harness.GIB), torch.bfloat16)
            plan = {"tile_size": tiles.size, "overlap": tiles.overlap, "streamed": tiles.streamed}
            found.append(row(vae, video, budget, tiles.peak) | plan)
    return found


def row(part: str, video: Video | None, budget: float | None, peak: Peak) -> Row:
    size = f"{video.width}x{video.height}x{video.frames}" if video else ""
    parts = {name: round(nbytes / harness.GIB, 4) for name, nbytes in peak.bytes_by_part.items()}
    return {
        "part": part,
        "video": size,
        "budget_gib": budget,
        "peak_gib": round(peak.total_bytes / harness.GIB, 4),
        "parts": parts,
    }


def main() -> None:
    options = harness.arguments(__doc__, update=harness.RESULTS / "graph-memory-simulated.json").parse_args()
    harness.import_comfyui()
    logging.getLogger().setLevel(logging.ERROR)
    found = rows()
    cells = [
        [row["part"], row["video"], row.get("tile_size", ""), f"{row['peak_gib']:.2f}", row["budget_gib"] or ""]
        for row in found
    ]
    result = {"machine": harness.SIMULATED, "rows": found}
    harness.conclude(options, result, harness.table(("part", "video", "tiles", "peak", "budget"), cells))


if __name__ == "__main__":
    main()
