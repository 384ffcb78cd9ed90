"""Everything of the pack that runs on a GPU, once, on a tiny Wan against the CPU; a stand-alone script.

    python bench/gpu_check.py results.jsonl [--patcher legacy]      (on the machine with the GPU)
    python bench/gpu_check.py results.jsonl --selftest              (the same on the CPU)

It needs torch, triton, numpy and the folder that `python3 dev.py bench gpu-host` assembles. A JSON line is written for
each step, with its seconds and either what was compared or the error:

    convert     a recipe by the GPU; difference of the dequantized weights from those of the CPU's file
    sample      the file, against the unquantized model; also with int8, with LoRAs and within a budget
    calibrate   a calibration collected while sampling, and files that are made with it on both devices
    tune        a file tuned block by block
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
for name, place in (("wanquant", ROOT), ("wanquant.bench", ROOT / "bench")):
    if name not in sys.modules:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(place)]

from wanquant.bench import gpu_host  # noqa: E402
from wanquant.bench.gpu_memory import PATCHERS, with_loras  # noqa: E402
from wanquant.bench.harness import GIB, Row, gpu_machine, write_row  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

RECIPES = ("Q8_0", "Q4_K_M", "Q2_K", "IQ2_XXS", "IQ1_M", "INT8", "FP8", "NVFP4")
SAMPLED = "Q4_K_M"
SELFTEST_RECIPES = (SAMPLED, "INT8")
CALIBRATED = "Q2_K"
# Latents: (batch, channels, frames, height, width). The large one has enough tokens for int8.
SMALL, LARGE, TINY = (1, 16, 5, 40, 40), (1, 16, 9, 60, 104), (1, 16, 2, 8, 8)


class Check:
    """The steps, each of which uses what the ones before it made."""

    def __init__(self, folder: Path, recipes: Iterable[str], *, selftest: bool) -> None:
        import comfy.sd
        import torch

        from wanquant.testing.tiny_wan import write_tiny_wan

        self._folder, self._recipes, self._selftest = folder, recipes, selftest
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._dtype = torch.float32 if selftest else torch.bfloat16
        size = {"dim": 256, "ffn_dim": 256, "layers": 1} if selftest else {"dim": 512, "ffn_dim": 2048, "layers": 1}
        self._source = write_tiny_wan(folder / "tiny.safetensors", **size)
        self._dense = comfy.sd.load_diffusion_model(str(self._source), {"dtype": self._dtype})
        self._expected = self._sample(self._dense)

    def steps(self) -> list[tuple[str, Callable[[], Row]]]:
        """Return the steps by name, in their order."""
        converted = [(f"convert {recipe}", lambda recipe=recipe: self._convert(recipe)) for recipe in self._recipes]
        return [
            *converted,
            ("sample int8", lambda: self._against(self._load(precision="int8"), self._load(), LARGE)),
            ("sample two LoRAs", lambda: self._against(with_loras(self._load(), 2), self._load())),
            ("sample within a budget", lambda: self._within_budget(self._load())),
            (
                "sample int8 and LoRA within a budget",
                lambda: self._within_budget(with_loras(self._load(precision="int8"), 1)),
            ),
            ("calibrate", self._calibrate),
            ("tune", self._tune),
        ]

    def _sample(self, patcher: Any, shape: tuple[int, ...] = SMALL, steps: int = 2) -> Tensor:
        import comfy.sample
        import torch

        shape = TINY if self._selftest else shape
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        text = [[torch.randn(1, 512, 4096, generator=torch.Generator().manual_seed(2)), {}]]
        arguments = (patcher, noise, steps, 1.0, "euler", "simple", text, text, torch.zeros_like(noise))
        latent: Tensor = comfy.sample.sample(*arguments, disable_pbar=True, seed=0)
        return latent

    def _load(self, *, precision: str = "exact") -> Any:
        from wanquant.ops.loading.diffusion_model import load_diffusion_model

        return load_diffusion_model(self._folder / f"{SAMPLED}.gguf", dtype=self._dtype, precision=precision)

    def _convert(self, recipe: str, importance: Any = None, effort: Any = "best") -> Row:
        """Convert on both devices, and sample the file of the GPU."""
        from wanquant.ops.loading.native_model import load_any_model
        from wanquant.quant import convert
        from wanquant.quant.inspection.verify import verify
        from wanquant.quant.plan.recipe import find_recipe

        stem = recipe if importance is None else f"{recipe}-{effort}"
        paths = [self._folder / f"{stem}{mark}{find_recipe(recipe).suffix}" for mark in ("", "-cpu")]
        row: Row = {}
        for path, device in zip(paths, (self._device, "cpu"), strict=True):
            report = convert(self._source, path, recipe, importance=importance, effort=effort, device=device)
            where = "gpu" if path == paths[0] else "cpu"
            row[f"{where}_seconds"] = round(report.seconds, 2)
            row[f"{where}_error"] = verify(path, self._source).by_role[-1].relative_error
        model = load_any_model(paths[0], dtype=self._dtype)
        return row | {"difference": _difference(self._sample(model), self._expected)}

    def _against(self, one: Any, other: Any, shape: tuple[int, ...] = SMALL) -> Row:
        return {"difference": _difference(self._sample(one, shape), self._sample(other, shape))}

    def _within_budget(self, patcher: Any) -> Row:
        from wanquant.ops.budget.choose_plan import closest_plan
        from wanquant.ops.budget.sampling import with_budget
        from wanquant.ops.budget.sampling_job import SamplingJob
        from wanquant.ops.budget.simulator import Simulator

        job = SamplingJob(TINY if self._selftest else LARGE)
        least = closest_plan(Simulator.from_patcher(patcher), job, 0).peak.total_bytes
        return {"budget_gib": round(least / GIB, 3)} | self._against(with_budget(patcher, least), patcher, LARGE)

    def _calibrate(self) -> Row:
        from wanquant.ops.collect_importance import with_collector
        from wanquant.quant import read_calibration, write_calibration
        from wanquant.quant.statistics.calibration import CalibrationCollector

        collector = CalibrationCollector()
        self._sample(with_collector(self._dense, collector), steps=4)
        calibration = read_calibration(write_calibration(self._folder / "calibration.safetensors", collector.result()))
        efforts = ("best",) if self._selftest else ("best", "thorough")
        return {effort: self._convert(CALIBRATED, calibration, effort) for effort in efforts}

    def _tune(self) -> Row:
        import comfy.model_management

        from wanquant.ops.loading.diffusion_model import load_diffusion_model
        from wanquant.ops.tuning.capture_blocks import with_capture
        from wanquant.ops.tuning.tune_model import tune_model
        from wanquant.quant.tuning.capture import Capture
        from wanquant.quant.tuning.tune import TuneSettings

        capture = Capture(self._folder, 1 << 28)
        self._sample(with_capture(self._dense, capture), steps=4)
        blocks, path = capture.write(self._folder / "x.blocks.safetensors"), self._folder / "tuned.gguf"
        comfy.model_management.unload_all_models()
        tune_model(self._dense, blocks, path, CALIBRATED, TuneSettings(device=self._device))
        return {"difference": _difference(self._sample(load_diffusion_model(path, dtype=self._dtype)), self._expected)}


def _difference(latent: Tensor, expected: Tensor) -> float:
    return float((latent - expected).norm() / expected.norm())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="file for the JSON lines")
    parser.add_argument("--carried", type=Path, default=ROOT / "out" / "gpu-host", help="the assembled folder")
    parser.add_argument("--patcher", choices=PATCHERS, default=PATCHERS[0], help="the host's memory mode")
    parser.add_argument("--recipes", nargs="+", help=f"convert to these, and to {SAMPLED}, which other steps sample")
    parser.add_argument("--selftest", action="store_true", help="on the CPU")
    options = parser.parse_args()
    recipes = options.recipes or (SELFTEST_RECIPES if options.selftest else RECIPES)
    gpu_host.start(options.carried, dynamic=options.patcher == "dynamic")
    import torch

    failures = 0
    with (
        options.results.open("a") as file,
        tempfile.TemporaryDirectory() as folder,
        torch.inference_mode(),  # as the host's executor
    ):
        write_row(file, gpu_machine())
        for name, step in Check(Path(folder), dict.fromkeys((*recipes, SAMPLED)), selftest=options.selftest).steps():
            started, row = time.monotonic(), {"case": name}
            try:
                row |= step()
            except Exception as error:  # noqa: BLE001 (the other steps must run)
                row["error"] = f"{type(error).__name__}: {error}"
                failures += 1
            write_row(file, row | {"seconds": round(time.monotonic() - started, 1)})
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
