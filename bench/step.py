"""Time of a sampling step at 1.3B's layer shapes on the CPU: packed, dense bfloat16, and packed by ComfyUI-GGUF.

The packed and the dense model take turns in one process, and the least processor time of each counts. A few blocks
stand for all thirty, which cost the same. `collecting` is the time of the packed model's step while an importance
matrix is collected, over the time without.
"""

from __future__ import annotations

import importlib
import sys
import time
import types
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..quant.conversion.convert import convert
from ..quant.statistics.importance import Collector
from . import harness
from .convert import write_source

Step = Callable[[], object]
Measure = Callable[[Path, str, torch.Size, float, Path | None], dict[str, object]]
"""A function that measures one row: (source, recipe, shape of the latent, seconds to spend, peer's checkout)."""
SIZE, CHANNELS, TEXT = "1.3B", 16, (512, 4096)


def step_of(patcher: Any, latent: torch.Size) -> Step:
    """Load the weights, and return a call of one forward of the diffusion model."""
    model = patcher.patch_model(torch.device("cpu"), lowvram_model_memory=0).diffusion_model
    generator = torch.Generator().manual_seed(0)
    x, text = (torch.randn(s, generator=generator).bfloat16() for s in (latent, (1, *TEXT)))
    return partial(torch.inference_mode()(model), x, torch.tensor([500.0]), text)


def dense_model(source: Path) -> Any:
    import comfy.sd
    import comfy.utils

    return comfy.sd.load_diffusion_model_state_dict(comfy.utils.load_torch_file(str(source)), {"dtype": torch.bfloat16})


def packed_model(file: Path) -> Any:
    from ..ops.loading.diffusion_model import load_diffusion_model

    return load_diffusion_model(file, dtype=torch.bfloat16)


def collecting_step(patcher: Any, step: Step) -> Step:
    """Return a call of one step while an importance matrix is collected."""
    from ..ops.collect_importance import collecting

    collector = Collector()

    def run() -> None:
        with collecting(patcher.model.diffusion_model, collector):
            step()

    return run


def peer_model(checkout: Path, file: Path) -> Any:
    """Load a file as ComfyUI-GGUF's Unet Loader does, with its default settings."""
    import comfy.sd

    if "peer" not in sys.modules:
        sys.modules["peer"] = types.ModuleType("peer")
        sys.modules["peer"].__path__ = [str(checkout)]
    loader, ops = (importlib.import_module(f"peer.{name}") for name in ("loader", "ops"))
    options = {"custom_operations": ops.GGMLOps(), "dtype": torch.bfloat16}
    return comfy.sd.load_diffusion_model_state_dict(loader.gguf_sd_loader(str(file)), options)


def measure(source: Path, recipe: str, latent: torch.Size, seconds: float, peer: Path | None) -> dict[str, object]:
    file = source.with_name(f"{source.stem}-{recipe}.gguf")
    convert(source, file, recipe, effort="fast")
    packed = packed_model(file)
    models = [packed, dense_model(source), *([peer_model(peer, file)] if peer else [])]
    steps = [step_of(model, latent) for model in models]
    collects = collecting_step(packed, steps[0])
    ours, collecting, dense, *others = harness.fastest(seconds, steps[0], collects, *steps[1:], clock=time.process_time)
    row: dict[str, object] = {"recipe": recipe, "tokens": latent[2:].numel() // 4}
    row |= {"seconds": round(ours / 1e3, 2), "of_bf16": round(ours / dense, 3)}
    row["collecting"] = round(collecting / ours, 3)
    if others:
        row["peer_of_bf16"] = round(others[0] / dense, 3)
    return row


def run(description: str, measure: Measure, columns: Sequence[str], **defaults: Any) -> None:
    """Measure every recipe at every number of frames, as the command line says, and print the result."""
    parser = harness.arguments(description, threads=1)
    parser.add_argument("--peer", type=Path, help="a checkout of ComfyUI-GGUF")
    parser.add_argument("--recipes", nargs="+")
    parser.add_argument("--frames", nargs="+", type=int, help="latent frames of 832 x 480 pixels")
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--seconds", type=float, help="time for each row")
    parser.set_defaults(**defaults)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    harness.import_comfyui()
    source = write_source(SIZE, options.blocks)
    rows = [
        measure(source, recipe, torch.Size((1, CHANNELS, frames, 60, 104)), options.seconds, options.peer)
        for frames in options.frames
        for recipe in options.recipes
    ]
    result = {"machine": harness.machine(), "blocks": options.blocks, "rows": rows}
    text = harness.table(columns, harness.cells(rows, columns))
    harness.conclude(options, result, f"{result['machine']}; {options.blocks} blocks of {SIZE}\n{text}")


def main() -> None:
    columns = ("recipe", "tokens", "seconds", "of_bf16", "collecting", "peer_of_bf16")
    recipes = ["Q8_0", "Q6_K", "Q5_0", "Q4_K_M", "Q4_0"]
    run(__doc__ or "", measure, columns, recipes=recipes, frames=[1, 3], blocks=2, seconds=20)


if __name__ == "__main__":
    main()
