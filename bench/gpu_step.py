"""The time of a step by file format and precision on a GPU, against weights in bfloat16; a stand-alone script.

    python bench/gpu_step.py results.jsonl [--layers 10] [--minutes 5]      (on the machine with the GPU)
    python bench/gpu_step.py results.jsonl --selftest                       (tiny shapes, no GPU)

It needs torch, triton, numpy and the folder that `python3 dev.py bench gpu-host` assembles; comfy-kitchen's compiled
kernels must be added to it for products in 8 bits at their full speed. A random file of Wan 14B's shapes, with fewer
blocks, is converted to each format on the GPU. Each is sampled for two steps. A JSON line is written for each case:

    budget_gib          what Wan Low VRAM may use; without it, ComfyUI's own forward runs, with all weights on the GPU
    plan                stock: ComfyUI's own forward; lean: in pieces
    seconds_a_step      of the second step
    of_bf16             relative to bfloat16 without Wan Low VRAM
    difference          of the latent from that of bfloat16, relative
"""

from __future__ import annotations

import argparse
import sys
import time
import types
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
for name, place in (("wanquant", ROOT), ("wanquant.bench", ROOT / "bench")):
    if name not in sys.modules:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(place)]

from wanquant.bench import gpu_host  # noqa: E402
from wanquant.bench.gpu_memory import PATCHERS, SMALL, sample, write_model  # noqa: E402
from wanquant.bench.gpu_meter import Meter  # noqa: E402
from wanquant.bench.harness import GIB, Row, cells, gpu_machine, table, write_row  # noqa: E402

SOURCE = "Q4_K_M"
ALL_GIB, LEAN_GIB = 40.0, 2.2
"""A budget for all weights and their 8-bit rows, and one in which blocks run in pieces."""


class Case(NamedTuple):
    recipe: str
    precision: str = "exact"
    budget_gib: float | None = None


CASES = [
    Case("BF16"),
    Case(SOURCE),
    Case(SOURCE, "int8"),
    Case(SOURCE, "int8", ALL_GIB),
    Case("INT8"),
    Case("W4A8"),
    Case("FP8"),
    *(Case(recipe, budget_gib=LEAN_GIB) for recipe in ("BF16", SOURCE)),
    Case(SOURCE, "int8", LEAN_GIB),
    Case(SOURCE, "auto", LEAN_GIB),
    *(Case(recipe, budget_gib=LEAN_GIB) for recipe in ("INT8", "W4A8", "FP8")),
]
TINY = (512, 512, 5)


class Steps:
    """The cases, each against bfloat16 without Wan Low VRAM, the first one."""

    def __init__(self, folder: Path, *, layers: int, selftest: bool) -> None:
        import torch

        from wanquant.quant.plan.wan_shapes import SIZES, WanSize

        self._dtype = torch.float32 if selftest else torch.bfloat16  # CPUs are slow in 16 bits
        self._folder, self._video, self._meter = folder, TINY if selftest else SMALL, Meter()
        size = WanSize(256, 512, 1) if selftest else SIZES["14B"]._replace(layers=layers)
        self._source = folder / f"random-{size.dim}-{size.layers}-{SOURCE}.gguf"
        if not self._source.exists():
            write_model(self._source, size)
        self._expected: Any = None
        self._bf16_seconds = 0.0

    def row(self, case: Case) -> Row:
        import comfy.model_management

        from wanquant.ops.budget.choose_plan import closest_plan
        from wanquant.ops.budget.sampling import with_budget
        from wanquant.ops.budget.sampling_job import SamplingJob
        from wanquant.ops.budget.simulator import Simulator
        from wanquant.ops.loading.native_model import load_any_model

        patcher = load_any_model(self._file(case.recipe), dtype=self._dtype, precision=case.precision)
        job, plan = SamplingJob.for_video(*self._video), "stock"
        if case.budget_gib is not None:
            budget = round(case.budget_gib * GIB)
            choice = closest_plan(Simulator.from_patcher(patcher), job, budget)
            plan, budget = choice.name, max(budget, choice.peak.total_bytes)
            patcher = with_budget(patcher, budget)
        try:
            latent, seconds = sample(patcher, job.latent, self._meter)
        finally:
            comfy.model_management.unload_all_models()
        row: Row = {"plan": plan, "seconds_a_step": round(seconds, 3)}
        if case == CASES[0]:
            self._expected, self._bf16_seconds = latent, seconds
        if self._expected is not None:
            difference = (latent - self._expected).norm() / self._expected.norm()
            row["of_bf16"] = round(seconds / self._bf16_seconds, 3)
            row["difference"] = float(f"{float(difference):.3g}")
        return row

    def _file(self, recipe: str) -> Path:
        """Return the file in this format, which is converted if it does not exist."""
        from wanquant.quant import convert
        from wanquant.quant.plan.recipe import find_recipe

        if recipe == SOURCE:
            return self._source
        path = self._source.with_name(self._source.stem.replace(SOURCE, recipe) + find_recipe(recipe).suffix)
        if not path.exists():
            convert(self._source, path, recipe, effort="fast", device=self._meter.device)
        return path


def cases(options: argparse.Namespace) -> list[Case]:
    chosen = [case for case in CASES if not options.recipes or case.recipe in ("BF16", *options.recipes)]
    if options.selftest:  # the least budget
        return [case if case.budget_gib is None else case._replace(budget_gib=0.0) for case in chosen]
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="file for the JSON lines")
    parser.add_argument("--carried", type=Path, default=ROOT / "out" / "gpu-host", help="the assembled folder")
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "bench", help="for the models, 0.9 GiB a block")
    parser.add_argument("--patcher", choices=PATCHERS, default=PATCHERS[0], help="the host's memory mode")
    parser.add_argument("--recipes", nargs="*", help="only these formats, after BF16")
    parser.add_argument("--layers", type=int, default=10, help="blocks of the model")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--selftest", action="store_true", help="tiny shapes, also on the CPU")
    options = parser.parse_args()
    gpu_host.start(options.carried, dynamic=options.patcher == "dynamic")
    import torch

    deadline, rows = time.monotonic() + 60 * options.minutes, []
    options.folder.mkdir(parents=True, exist_ok=True)
    with options.results.open("a") as file, torch.inference_mode():  # as the host's executor
        write_row(file, gpu_machine() | {"layers": options.layers, "patcher": options.patcher})
        steps = Steps(options.folder, layers=options.layers, selftest=options.selftest)
        for case in cases(options):
            if time.monotonic() > deadline:
                break
            row: Row = {"case": "step", **case._asdict()}
            try:
                row |= steps.row(case)
            except Exception as error:  # noqa: BLE001 (the other cases must run)
                row["error"] = f"{type(error).__name__}: {error}".partition("\n")[0]
            write_row(file, row)
            rows.append(row)
    columns = [*Case._fields, "plan", "seconds_a_step", "of_bf16", "difference"]
    print(table(columns, cells(rows, columns)))
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
