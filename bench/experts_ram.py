"""Main memory of a Wan 2.2 pair of experts, sampled one after the other under a limit on the process (Linux).

The files are mapped. The limit holds all other memory: whatever the process allocates beyond `--allowance` fails. The
system may drop the pages of mapped files whenever memory is short, and read them again.
"""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..quant.plan.recipe import RECIPES
from ..quant.plan.wan_files import tensor_specs
from ..quant.plan.wan_shapes import SIZES
from ..testing.hosts import ROOT
from . import harness
from .load import write_model

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

LATENT, PROMPT = (1, 16, 1, 8, 8), (1, 16, 4096)


def status() -> dict[str, int]:
    """Return the bytes of this process: allocated (VmData, with private maps), and resident by kind."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {key: int(fields[key].split()[0]) << 10 for key in ("VmData", "RssAnon", "RssFile")}


def sample(expert: ModelPatcher) -> float:
    """Sample one step, and return its seconds."""
    import comfy.sample

    noise, prompts = torch.zeros(LATENT), [[[torch.zeros(PROMPT), {}]]] * 2
    started = time.monotonic()
    out = comfy.sample.sample(expert, noise, 1, 1.0, "euler", "simple", *prompts, noise, disable_pbar=True, seed=0)
    if not out.isfinite().all():
        raise SystemExit("the sampled latent holds NaN or infinity, expected finite numbers")
    return round(time.monotonic() - started, 1)


def measure(files: list[Path], allowance: float) -> dict[str, Any]:
    """Load and sample both experts within `allowance` GiB of allocations, and return what they took, in GiB."""
    from ..ops.budget.expert_pair import load_expert_pair

    mapped, before = sum(file.stat().st_size for file in files), status()
    limit = before["VmData"] + mapped + round(allowance * harness.GIB)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
    # ComfyUI runs its nodes in inference mode.
    with torch.inference_mode(), harness.sampled(lambda: status()["RssAnon"], 0.05) as anonymous:
        *experts, _ = load_expert_pair(*files)
        seconds = [sample(expert) for expert in experts]
    sizes = {"mapped_gib": mapped, "before_gib": before["RssAnon"], "peak_anonymous_gib": max(anonymous)}
    return {"seconds": seconds} | {key: round(nbytes / harness.GIB, 2) for key, nbytes in sizes.items()}


def main() -> None:
    parser = harness.arguments(__doc__, update=harness.RESULTS / "experts-ram.json")
    parser.add_argument("--recipe", default="Q4_K_M", choices=RECIPES)
    parser.add_argument("--blocks", type=int, default=40, help="transformer blocks of each file; 40 are a whole 14B")
    parser.add_argument("--allowance", type=float, default=2, help="GiB that the process may allocate beside the files")
    options = parser.parse_args()
    folder = ROOT / "out" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    harness.import_comfyui()
    specs = tensor_specs(SIZES["14B"]._replace(layers=options.blocks), RECIPES[options.recipe])
    files = [write_model(folder / f"expert-{name}.gguf", specs) for name in ("high", "low")]
    try:
        found = measure(files, options.allowance)
    finally:
        for file in files:
            file.unlink()
    row = {"recipe": options.recipe, "blocks": options.blocks, "allowance_gib": options.allowance, **found}
    text = f"""{harness.machine()}
two experts of {options.blocks} blocks in {options.recipe}: {found["mapped_gib"]} GiB mapped
allocations beside these: limited to {options.allowance} GiB more than the {found["before_gib"]} before loading
peak of the memory that is not mapped: {found["peak_anonymous_gib"]} GiB
seconds of a step: {found["seconds"]}"""
    harness.conclude(options, {"machine": harness.machine(), "rows": [row]}, text)


if __name__ == "__main__":
    main()
