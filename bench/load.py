"""Time that the pack adds to ComfyUI's start; size of a GGUF, time and memory from disk to the first forward pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..quant.gguf.layout import TensorSpec
from ..quant.gguf.writer import GGUFWriter
from ..quant.plan.recipe import RECIPES
from ..quant.plan.wan_files import tensor_specs
from ..quant.plan.wan_shapes import SIZES
from ..quant.qtype import Effort
from ..testing.hosts import ROOT, checkout
from . import harness
from .convert import resident

START_UP_MS = 150.0
"""Limit of the milliseconds that the pack adds."""
# Packages that are large or slow to import, and not needed until a node runs.
LATE = {"gguf", "matplotlib", "triton", "sentencepiece", "_dynamo", "_inductor"}
# Imports what ComfyUI imports before its custom nodes, then loads the pack as ComfyUI does: entry point and schemas.
# The pack is compiled first, as it is after its first start, into a temporary folder.
START = """
import asyncio, compileall, importlib.util, json, runpy, sys, tempfile, time
comfyui, root = sys.argv[1:]
sys.path.insert(0, comfyui)
runpy.run_path(root + "/testing/host_shims.py")["install"]()
from comfy.cli_args import args
args.cpu = True
import nodes, comfy_extras.nodes_wan, server
server.PromptServer(asyncio.new_event_loop())
from comfy_api.latest import ComfyExtension, io
cache = tempfile.TemporaryDirectory()
sys.pycache_prefix = cache.name
for folder in ("quant", "ops", "nodes"):
    compileall.compile_dir(f"{root}/{folder}", quiet=1)
before = set(sys.modules)
started = time.process_time()
spec = importlib.util.spec_from_file_location("pack", root + "/__init__.py", submodule_search_locations=[root])
sys.modules["pack"] = pack = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
async def load():
    extension = await pack.comfy_entrypoint()
    await extension.on_load()
    for node in await extension.get_node_list():
        node.GET_SCHEMA()
asyncio.run(load())
seconds = time.process_time() - started
print(json.dumps({"ms": round(1000 * seconds, 1), "modules": sorted(set(sys.modules) - before)}))
"""


def start_up() -> dict[str, Any]:
    """Return the processor time in ms that the pack adds to ComfyUI's start, and the modules that it imports."""
    command = [sys.executable, "-c", START, str(checkout()), str(ROOT)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def late_modules(modules: list[str]) -> set[str]:
    """Return the modules that should not be imported at the start."""
    return {name for name in modules if LATE & set(name.split(".")) and not name.startswith("pack")}


def write_model(path: Path, specs: Sequence[TensorSpec]) -> Path:
    """Write a file whose rows repeat one row of noise for each tensor, which is fast to write."""
    with GGUFWriter(path, {"general.architecture": "wan"}, specs, overwrite=True) as writer:
        for spec in specs:
            # ggml's encoders of the smallest types need an importance.
            effort: Effort = "best" if spec.qtype.fast_in_c else "fast"
            row = spec.qtype.quantize(0.02 * torch.randn(spec.shape[-1]), effort=effort)
            writer.write(spec.name, row.expand(spec.qtype.packed_shape(spec.shape)).contiguous())
    return path


def from_disk(path: Path) -> dict[str, float]:
    """Return the seconds to read the file, to load it, and of two forward passes of few tokens.

    The file is dropped from the page cache before each but the last.
    """
    from ..ops.loading.diffusion_model import load_diffusion_model

    read = timed(path, lambda: _read(path))
    patchers: list[Any] = []
    load = timed(path, lambda: patchers.append(load_diffusion_model(path)))
    model = patchers[0].model.diffusion_model
    inputs = torch.randn(1, model.in_dim, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 4, 4096)

    def forward() -> None:
        with torch.inference_mode():
            if not model(*inputs).isfinite().all():
                raise SystemExit(f"{path}: the model's output holds NaN or infinity, expected finite numbers")

    return {"read": read, "load": load, "first_forward": timed(path, forward), "second_forward": timed(None, forward)}


def timed(cold: Path | None, work: Callable[[], object]) -> float:
    """Return the seconds of `work`, after dropping the file `cold` from the page cache."""
    if cold:
        with cold.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    started = time.monotonic()
    work()
    return time.monotonic() - started


def _read(path: Path) -> None:
    buffer = bytearray(16 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--size", default="14B", choices=SIZES)
    parser.add_argument("--recipe", default="Q8_0", choices=RECIPES)
    parser.add_argument("--blocks", type=int, default=4, help="transformer blocks of the file; 40 are a whole 14B")
    options = parser.parse_args()
    folder = ROOT / "out" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    starts = [start_up()["ms"] for _ in range(3)]
    harness.import_comfyui(cpu=not torch.accelerator.is_available())
    specs = tensor_specs(SIZES[options.size]._replace(layers=options.blocks), RECIPES[options.recipe])
    path = write_model(folder / f"load-{options.size}-{options.blocks}-{options.recipe}.gguf", specs)
    file = {"model": options.size, "blocks": options.blocks, "recipe": options.recipe}
    gib, predicted = path.stat().st_size / harness.GIB, sum(spec.nbytes for spec in specs) / harness.GIB
    with harness.sampled(lambda: resident("self")["RssAnon"], 0.02) as anonymous:
        seconds = from_disk(path)
    peaks = {"anonymous": max(anonymous) / harness.GIB, "resident": resident("self")["VmHWM"] / harness.GIB}
    path.unlink()
    # The second pass is arithmetic alone; the rest of the first one is loading.
    loading = seconds["load"] + seconds["first_forward"] - seconds["second_forward"]
    result = {"machine": harness.machine(), "start_up_ms": starts, **file, "gib": gib, "predicted_gib": predicted}
    result |= {"loading": loading, **seconds}
    result |= {f"peak_{kind}_gib": peak for kind, peak in peaks.items()}
    text = f"""{result["machine"]}
ComfyUI's start: {min(starts)} ms more of processor time (at most {START_UP_MS:.0f})
{options.blocks} blocks in {options.recipe}: {gib:.3f} GiB, {predicted:.3f} predicted for its tensors
seconds: {", ".join(f"{key.replace('_', ' ')} {value:.2f}" for key, value in seconds.items())}
loading to the first forward, arithmetic not counted: {loading / seconds["read"]:.2f} x reading the file
peak GiB of memory: {peaks["anonymous"]:.2f}, with the pages of the file {peaks["resident"]:.2f}"""
    harness.conclude(options, result, text)


if __name__ == "__main__":
    main()
