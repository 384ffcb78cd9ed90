"""Memory and time of Wan 14B within a budget on a GPU, against the prediction; a stand-alone script.

    python bench/gpu_memory.py results.jsonl [--minutes 20]          (on the machine with the GPU)
    python bench/gpu_memory.py results.jsonl --selftest              (tiny shapes, no GPU)

It needs torch, triton, numpy and out/gpu-host, but neither a server nor a network. `python3 dev.py bench gpu-host`
assembles that folder on a machine with ComfyUI; on such a machine this script makes it if it is missing.

A random GGUF of true shapes is sampled for two steps, by ComfyUI's own forward and by Wan Low VRAM in its budget, in 16
bits and in int8, with and without two LoRAs. This is done with dynamic VRAM and then without, in one process each.
After a case that crashes or hangs, a new process continues with the next case. All memory beyond the budget is
allocated, so that nothing can exceed it. A JSON line is written for each case, and a table at the end:

    budget_gib          what Wan Low VRAM may use; the smallest possible where the case says 0
    arithmetic          floating-point operations over those of ComfyUI's own forward
    predicted_gib       the simulated parts
    spare_gib           free memory beyond the budget without which the case ran out of memory
    without_spare       the errors with less
    context_gib         used before the first tensor
    resident_gib        weights that stayed on the GPU
    kept_rows_gib       room for 8-bit rows that stay on the GPU
    torch_gib           peak of torch's tensors
    reserved_gib        peak of torch's allocator
    device_gib          peak of the process according to the driver, sampled
    fragmentation_gib   reserved_gib without torch_gib
    of_predicted        the measured peak over the prediction and what stayed on the GPU. The peak is torch_gib, with
                        dynamic VRAM device_gib, because buffers then lie outside torch's allocator; the prediction
                        then includes the context and the fragmentation.
    difference          relative difference of the latent from that of ComfyUI's own forward
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# These packages get no __init__, so that only what is used is imported.
for name, place in (("wanquant", ROOT), ("wanquant.bench", ROOT / "bench")):
    if name not in sys.modules:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(place)]

from wanquant.bench import gpu_host  # noqa: E402
from wanquant.bench.gpu_meter import Meter, gib, of_predicted  # noqa: E402
from wanquant.bench.harness import GIB, Row, cells, gpu_machine, table, write_row  # noqa: E402
from wanquant.testing.hosts import checkout  # noqa: E402

RECIPE, STEPS, PROMPT = "Q4_K_M", 2, (1, 512, 4096)
LORAS, RANK = 2, 64
STOCK_GIB, LEANEST = 24.0, 0.0
PATCHERS = ("dynamic", "legacy")
HANGS_SECONDS = 300
"""Seconds that a process has for its current case after its time is over."""


class Case(NamedTuple):
    width: int
    height: int
    frames: int
    gib: float
    loras: int = 0
    precision: str = "exact"

    @property
    def video(self) -> tuple[int, int, int]:
        return self[:3]


# The most important cases first.
SMALL, LARGE = (832, 480, 81), (1280, 720, 81)
_BUDGETS = [(SMALL, STOCK_GIB), (SMALL, 2.2), (LARGE, STOCK_GIB), (LARGE, 3.5)]
_LEAST = [(SMALL, LEANEST), (LARGE, LEANEST)]
CASES = [
    *(Case(*video, gib) for video, gib in _BUDGETS),
    *(Case(*video, gib, precision="int8") for video, gib in _BUDGETS),
    *(Case(*video, gib) for video, gib in _LEAST),
    *(Case(*video, gib, LORAS) for video, gib in _BUDGETS + _LEAST),
]
SPARE_GIB = (0, 0.05, 0.1, 0.2, 0.4)
TINY = [Case(512, 512, 5, gib, loras) for loras in (0, 1) for gib in (STOCK_GIB, LEANEST)]
TINY[-1] = TINY[-1]._replace(precision="int8")


def write_model(path: Path, size: Any) -> None:
    """Write a GGUF of true shapes whose blocks are drawn from a few that encode Gaussian weights."""
    import torch

    from wanquant.quant.gguf.writer import GGUFWriter
    from wanquant.quant.plan.recipe import find_recipe
    from wanquant.quant.plan.wan_files import tensor_specs

    specs = tensor_specs(size, find_recipe(RECIPE))
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    few = {
        kind: kind.quantize(torch.randn(64, 256) / size.dim**0.5, effort="fast")
        for kind in {spec.qtype for spec in specs}
    }
    with GGUFWriter(path, {"general.architecture": "wan"}, specs) as writer:
        for spec in specs:
            blocks = few[spec.qtype].view(-1, spec.qtype.type_size)
            if len(spec.shape) == 1 and spec.name.endswith(".weight"):
                blocks = spec.qtype.quantize(torch.ones(1, 256)).view(-1, spec.qtype.type_size)
            drawn = blocks[torch.randint(len(blocks), (spec.nbytes // spec.qtype.type_size,))]
            writer.write(spec.name, drawn.view(spec.qtype.packed_shape(spec.shape)))


def with_loras(patcher: Any, count: int) -> Any:
    """Add LoRAs on every packed layer, always with the same values, in main memory as ComfyUI's loader does."""
    import torch
    from comfy.weight_adapter import LoRAAdapter

    from wanquant.ops.packed.linear import packed_modules

    torch.manual_seed(2)
    for _ in range(count):
        patcher = patcher.clone()
        for key, module in packed_modules(patcher.model):
            up, down = torch.randn(module.out_features, RANK), torch.randn(RANK, module.in_features)
            factors = ((up / 100).bfloat16(), (down / 100).bfloat16(), None, None, None, None)
            patcher.add_patches({key: LoRAAdapter(set(), factors)}, 0.5)
    return patcher


def sample(patcher: Any, latent: tuple[int, ...], meter: Meter) -> tuple[Any, float]:
    """Return the latent after two steps, and the seconds of the second step."""
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
    """A model that is measured case by case, each against its prediction."""

    def __init__(self, path: Path, dtype: Any) -> None:
        from wanquant.ops.loading.diffusion_model import load_diffusion_model

        self._meter = Meter()
        self._path = path
        self._plain = {
            precision: load_diffusion_model(path, dtype=dtype, precision=precision) for precision in ("exact", "int8")
        }

    def row(self, case: Case) -> Row:
        import comfy.model_management

        from wanquant.ops.budget.choose_plan import closest_plan
        from wanquant.ops.budget.row_room import row_room, spendable
        from wanquant.ops.budget.sampling import with_budget
        from wanquant.ops.budget.sampling_job import SamplingJob
        from wanquant.ops.budget.simulator import Simulator

        patcher, job = with_loras(self._plain[case.precision], case.loras), SamplingJob.for_video(*case.video)
        simulated, budget = Simulator.from_patcher(patcher), round(case.gib * GIB)
        choice = closest_plan(simulated, job, budget)
        budget = max(budget, choice.peak.total_bytes)
        if choice.plan or case.precision != "exact":  # 8-bit rows are kept in what the budget leaves
            patcher = with_budget(patcher, budget)

        def work() -> Row:
            latent, seconds = sample(patcher, job.latent, self._meter)
            row: Row = {"seconds_a_step": round(seconds, 3), "resident_gib": gib(patcher.loaded_size())}
            return row | self._difference(
                case, latent, is_reference=case.gib == STOCK_GIB and case.precision == "exact"
            )

        row: Row = {"case": "sample", "is_dynamic": patcher.is_dynamic(), "plan": choice.name, **case._asdict()}
        row |= {"budget_gib": gib(budget), "arithmetic": round(choice.slowdown, 4)}
        row["predicted_gib"] = {name: gib(size) for name, size in choice.peak.bytes_by_part.items()}
        row["kept_rows_gib"] = gib(row_room(patcher, job, choice.peak, spendable(patcher, budget)).nbytes)
        failures: list[str] = []
        for row["spare_gib"] in SPARE_GIB:
            result = self._meter.run(work, budget + round(row["spare_gib"] * GIB))
            if "error" not in result:
                break
            failures.append(result["error"])
            comfy.model_management.unload_all_models()
        row |= result
        if failures:
            row["without_spare"] = failures
        row["of_predicted"] = of_predicted(row, dynamic=patcher.is_dynamic())
        comfy.model_management.unload_all_models()
        return row

    def _difference(self, case: Case, latent: Any, *, is_reference: bool) -> Row:
        """Compare with the latent of ComfyUI's own forward in 16 bits, which a file keeps for the other processes."""
        import torch

        path = self._path.with_name(f"{self._path.stem}-{'x'.join(map(str, case.video))}-{case.loras}.latent")
        if is_reference:
            torch.save(latent, path)
        if not path.exists():
            return {}
        expected = torch.load(path)
        return {"difference": float((latent - expected).norm() / expected.norm())}


def measure(options: argparse.Namespace, deadline: float) -> None:
    """Measure the cases of one patcher in this process."""
    gpu_host.start(options.carried, dynamic=options.patcher == "dynamic")
    import torch

    from wanquant.quant.plan.wan_shapes import SIZES, WanSize

    with options.results.open("a") as file, torch.inference_mode():  # as the host's executor
        write_row(file, gpu_machine())
        if not options.model.exists():
            write_model(options.model, WanSize(256, 512, 1) if options.selftest else SIZES["14B"])
        bench = Bench(options.model, torch.float32 if options.selftest else torch.bfloat16)  # CPUs are slow in 16 bits
        for case in cases(options)[options.skip :]:
            if time.time() < deadline:
                write_row(file, bench.row(case))


def cases(options: argparse.Namespace) -> list[Case]:
    return [case for case in (TINY if options.selftest else CASES) if case.gib != STOCK_GIB or not options.lean]


def measure_all(options: argparse.Namespace, patcher: str, minutes: float) -> int:
    """Measure the cases of one patcher in as many processes as needed, and return how many cases failed."""
    skip, failures, deadline = 0, 0, time.time() + 60 * minutes
    while skip < len(cases(options)) and time.time() < deadline:
        seconds = deadline - time.time()
        command = [sys.executable, __file__, *sys.argv[1:], "--patcher", patcher, "--skip", str(skip)]
        command += ["--minutes", str(seconds / 60)]
        before = len(measured(options.results))
        try:
            code = subprocess.run(command, check=False, timeout=seconds + HANGS_SECONDS).returncode
        except subprocess.TimeoutExpired:
            code = -1
        if not code:
            break
        skip += len(measured(options.results)) - before
        with options.results.open("a") as file:
            for case in cases(options)[skip : skip + 1]:
                write_row(file, {"case": "failed", "patcher": patcher, "exit": code, **case._asdict()})
        skip, failures = skip + 1, failures + 1
    return failures


def measured(results: Path) -> list[Row]:
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    return [row for row in rows if row["case"] == "sample"]


def show(rows: list[Row]) -> None:
    settings = ["is_dynamic", "plan", "precision", "width", "height", "frames", "gib", "loras"]
    columns = [*settings, "of_predicted", "seconds_a_step"]
    print(table(columns, cells(rows, columns)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="file for the JSON lines")
    parser.add_argument("--carried", type=Path, default=ROOT / "out" / "gpu-host", help="the assembled folder")
    parser.add_argument("--model", type=Path, help="GGUF to sample; written if it does not exist (9 GiB)")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--selftest", action="store_true", help="tiny shapes, also on the CPU")
    parser.add_argument("--patcher", choices=PATCHERS, help="measure only this one, in this process")
    parser.add_argument("--lean", action="store_true", help="leave out ComfyUI's own forward; see --patcher")
    parser.add_argument("--skip", type=int, default=0, help="number of its cases to skip")
    options = parser.parse_args()
    name = "tiny" if options.selftest else "14B"
    options.model = options.model or ROOT / "out" / "bench" / f"random-{name}-{RECIPE}.gguf"
    deadline = time.time() + 60 * options.minutes
    if not options.carried.exists():
        gpu_host.assemble(options.carried, checkout())
    if options.patcher:
        measure(options, deadline)
        return 0
    before, failures = len(measured(options.results)), 0
    for index, patcher in enumerate(PATCHERS):
        minutes = (deadline - time.time()) / 60 / (len(PATCHERS) - index)
        failures += measure_all(options, patcher, minutes)
    show(measured(options.results)[before:])
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
