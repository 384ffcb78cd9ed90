"""Wan 14B within a budget on a GPU: peaks and seconds a step, beside what was predicted. A script of its own.

    python3 dev.py bench gpu-host                                    (once, where ComfyUI is: out/gpu-host)
    python bench/gpu_memory.py results.jsonl [--minutes 20]          (on the machine with the GPU)
    python bench/gpu_memory.py results.jsonl --selftest              (tiny shapes, no GPU)

Needs torch, triton, numpy and the assembled folder; no server, no network. A random GGUF of true shapes is sampled for
two steps, in ComfyUI's own forward and by Wan Low VRAM in its budget, with and without two LoRAs, first with dynamic
VRAM, then without, each in a process of its own. All memory beyond the budget is allocated, so that nothing can exceed
it. A JSON line is written for each case as soon as it is measured:

    predicted_gib   the simulated parts          torch_gib      most that torch's tensors held at once
    context_gib     before the first tensor      reserved_gib   most that torch's allocator held: with fragmentation
    resident_gib    weights that stayed          device_gib     most that the process held, by the driver, sampled
    difference      of the latent from that of ComfyUI's own forward, relative
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# Packages without their __init__, so that only what is used is imported.
for name, place in (("wanquant", ROOT), ("wanquant.bench", ROOT / "bench")):
    if name not in sys.modules:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(place)]

from wanquant.bench import gpu_host  # noqa: E402

GIB = 1 << 30
RECIPE, STEPS, PROMPT = "Q4_K_M", 2, (1, 512, 4096)
LORAS, RANK = 2, 64
STOCK_GIB, LEANEST = 24.0, 0.0
PATCHERS = ("dynamic", "legacy")
Row = dict[str, object]


class Case(NamedTuple):
    width: int
    height: int
    frames: int
    gib: float
    loras: int = 0

    @property
    def video(self) -> tuple[int, int, int]:
        return self[:3]


# Most telling first. The budgets are those of the README.
SMALL, LARGE = (832, 480, 81), (1280, 720, 81)
CASES = [
    Case(*video, gib, loras)
    for video, lean in ((SMALL, 1.95), (LARGE, 3.26))
    for gib, loras in ((STOCK_GIB, 0), (lean, 0), (STOCK_GIB, LORAS), (lean, LORAS))
]
TINY = [Case(256, 256, 9, gib, loras) for loras in (0, 1) for gib in (STOCK_GIB, LEANEST)]


def write_model(path: Path, size: Any) -> None:
    """A GGUF of true shapes whose blocks are drawn from a few that encode Gaussian weights."""
    import torch

    from wanquant.bench.sizes import Source
    from wanquant.quant.gguf_writer import GGUFWriter, TensorSpec
    from wanquant.quant.recipe import find_recipe, plan
    from wanquant.quant.wan import transformer_shapes

    shapes = transformer_shapes(size)
    kinds = plan(find_recipe(RECIPE), {name: Source(shape) for name, shape in shapes.items()}).types
    specs = [TensorSpec(name, kinds[name], shape) for name, shape in shapes.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    few = {kind: kind.quantize(torch.randn(64, 256) / size.dim**0.5, effort="fast") for kind in set(kinds.values())}
    with GGUFWriter(path, {"general.architecture": "wan"}, specs) as writer:
        for spec in specs:
            blocks = few[spec.qtype].view(-1, spec.qtype.type_size)
            if len(spec.shape) == 1 and spec.name.endswith(".weight"):
                blocks = spec.qtype.quantize(torch.ones(1, 256)).view(-1, spec.qtype.type_size)
            drawn = blocks[torch.randint(len(blocks), (spec.nbytes // spec.qtype.type_size,))]
            writer.write(spec.name, drawn.view(spec.qtype.packed_shape(spec.shape)))


def with_loras(patcher: Any, count: int) -> Any:
    """LoRAs of every packed layer, the same every time, in main memory as the host's loader has them."""
    import torch
    from comfy.weight_adapter import LoRAAdapter

    from wanquant.ops.linear import packed_modules

    torch.manual_seed(2)
    for _ in range(count):
        patcher = patcher.clone()
        for key, module in packed_modules(patcher.model):
            up, down = torch.randn(module.out_features, RANK), torch.randn(RANK, module.in_features)
            factors = ((up / 100).bfloat16(), (down / 100).bfloat16(), None, None, None, None)
            patcher.add_patches({key: LoRAAdapter(set(), factors)}, 0.5)
    return patcher


class Meter:
    """What one process takes of the GPU; without a GPU, nothing is measured."""

    def __init__(self) -> None:
        import torch

        self._gpu = torch.cuda.is_available()
        self.context = self._used() if self._gpu else 0

    def synchronize(self) -> None:
        import torch

        if self._gpu:
            torch.cuda.synchronize()

    def run(self, work: Callable[[], Row], budget: int) -> Row:
        """What `work` returns, and the most it took while all but `budget` bytes of the device were taken."""
        import torch

        if not self._gpu:
            return work()
        torch.cuda.empty_cache()
        taken = torch.cuda.mem_get_info()[1] - max(budget, self._used())
        ballast = torch.empty(taken, dtype=torch.uint8, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        row: Row = {"context_gib": gib(self.context)}
        with self._sampled() as device:
            try:
                row |= work()
            except torch.cuda.OutOfMemoryError as error:
                row["error"] = str(error).partition("\n")[0]
        peaks = {"torch": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        del ballast
        return row | {f"{name}_gib": gib(nbytes - taken) for name, nbytes in (peaks | {"device": max(device)}).items()}

    def _used(self) -> int:
        """Bytes of the whole device: no other program must use it."""
        import torch

        free, total = torch.cuda.mem_get_info()
        return int(total - free)

    @contextmanager
    def _sampled(self) -> Iterator[list[int]]:
        """What is used, every 10 ms while open."""
        used, done = [self._used()], threading.Event()

        def watch() -> None:
            while not done.wait(0.01):
                used.append(self._used())

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield used
        finally:
            done.set()
            thread.join()


def gib(nbytes: float) -> float:
    return round(nbytes / GIB, 3)


def sample(patcher: Any, latent: tuple[int, ...], meter: Meter) -> tuple[Any, float]:
    """The latent after two steps, and the seconds of the second."""
    import comfy.sample
    import torch

    generator, ticks = torch.Generator().manual_seed(1), []
    noise, prompt = (torch.randn(shape, generator=generator) for shape in (latent, PROMPT))

    def tick(*_: object) -> None:
        meter.synchronize()
        ticks.append(time.monotonic())

    arguments = (patcher, noise, STEPS, 1.0, "euler", "simple", [[prompt, {}]], [[prompt, {}]], torch.zeros(latent))
    result = comfy.sample.sample(*arguments, disable_pbar=True, callback=tick, seed=0)
    return result, ticks[-1] - ticks[-2]


class Bench:
    """The cases of one patcher, one after the other, each beside its prediction."""

    def __init__(self, path: Path) -> None:
        import torch

        from wanquant.ops.loader import load_diffusion_model

        self._meter = Meter()
        self._plain = load_diffusion_model(path, dtype=torch.bfloat16)
        self._stock: dict[tuple[object, ...], Any] = {}

    def row(self, case: Case) -> Row:
        import comfy.model_management

        from wanquant.ops.budget import with_budget
        from wanquant.ops.job import Job
        from wanquant.ops.simulator import Simulator
        from wanquant.ops.vram import candidates, choose

        patcher, job = with_loras(self._plain, case.loras), Job.of_video(*case.video)
        simulated, budget = Simulator.of(patcher), round(case.gib * GIB)
        if case.gib == LEANEST:
            budget = min(simulated.peak(job, plan).total for plan in candidates(simulated.heads))
        choice = choose(simulated, job, budget)
        if choice.plan:
            patcher = with_budget(patcher, budget)

        def work() -> Row:
            latent, seconds = sample(patcher, job.latent, self._meter)
            expected = self._stock.setdefault((case.video, case.loras), latent)
            difference = float((latent - expected).norm() / expected.norm())
            resident = gib(patcher.loaded_size())
            return {"seconds_a_step": round(seconds, 3), "resident_gib": resident, "difference": difference}

        row: Row = {"case": "sample", "is_dynamic": patcher.is_dynamic(), "plan": choice.name, **case._asdict()}
        row["predicted_gib"] = {name: gib(size) for name, size in choice.peak.parts.items()}
        row |= self._meter.run(work, budget)
        comfy.model_management.unload_all_models()
        return row


def measure(options: argparse.Namespace, deadline: float) -> None:
    """All cases of one patcher, in this process."""
    gpu_host.start(options.carried, dynamic=options.patcher == "dynamic")
    import torch

    from wanquant.quant.wan import SIZES, WanSize

    with options.results.open("a") as file, torch.inference_mode():  # as the host's executor

        def write(row: Row) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        write({"case": "machine", "gpu": gpu, "python": platform.python_version(), "torch": torch.__version__})
        if not options.model.exists():
            write_model(options.model, WanSize(256, 512, 1) if options.selftest else SIZES["14B"])
        bench = Bench(options.model)
        for case in TINY if options.selftest else CASES:
            if time.time() < deadline:
                write(bench.row(case))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON lines")
    parser.add_argument("--carried", type=Path, default=ROOT / "out" / "gpu-host", help="the assembled folder")
    parser.add_argument("--model", type=Path, help="written if it does not exist (9 GiB)")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--selftest", action="store_true", help="tiny shapes, also on the CPU")
    parser.add_argument("--patcher", choices=PATCHERS, help="only this one, in this process")
    options = parser.parse_args()
    name = "tiny" if options.selftest else "14B"
    options.model = options.model or ROOT / "out" / "bench" / f"random-{name}-{RECIPE}.gguf"
    deadline = time.time() + 60 * options.minutes
    if options.patcher:
        measure(options, deadline)
        return 0
    codes = []
    for patcher in PATCHERS:
        # A crash of the driver's context must not take the other half along.
        minutes = (deadline - time.time()) / 60 / (len(PATCHERS) - len(codes))
        command = [sys.executable, __file__, *sys.argv[1:], "--patcher", patcher, "--minutes", str(minutes)]
        codes.append(subprocess.run(command, check=False).returncode)
    return max(map(abs, codes))


if __name__ == "__main__":
    sys.exit(main())
