"""What each recipe costs TinyWan: the same seeds in bfloat16 and quantized, plain, with importance, and by ggml."""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from wanquant.bench.convert import machine
from wanquant.bench.tinywan.data import HELD_OUT, TRAINING, Caption
from wanquant.bench.tinywan.model import Model, build, velocity
from wanquant.bench.tinywan.score import generate, right
from wanquant.dev import ROOT
from wanquant.quant import convert, open_gguf
from wanquant.quant.importance import Collector, Importance
from wanquant.tests.libggml import load as load_libggml

CHECKPOINT = ROOT / "bench" / "tinywan" / "tinywan.safetensors"
RECIPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")
METHODS = ("ggml", "plain", "importance")
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Quality:
    """Errors are against the unquantized model on the same seeds, in dB: mean and deviation over the seeds."""

    recipe: str
    method: str
    nbytes: int
    weight_sqnr: float
    """Of all quantized weights."""
    velocity_sqnr: tuple[float, ...]
    """Of every step, on the unquantized model's way."""
    latent_psnr: float
    latent_spread: float
    motion_psnr: float
    """Of the differences between neighbouring frames."""
    motion_spread: float
    colour: float
    motion: float
    """Shares of the clips with the colour, and with the motion, of the caption."""


@dataclass(frozen=True)
class Reference:
    """The unquantized model's clips, and on the way to them what it was given and what it gave, step by step."""

    weights: Weights
    captions: tuple[Caption, ...]
    clips: Tensor
    calls: list[tuple[tuple[Tensor, Tensor, Tensor], Tensor]]

    @classmethod
    def sample(cls, seeds: int) -> Reference:
        weights = load_weights()
        captions = tuple(HELD_OUT[index % len(HELD_OUT)] for index in range(seeds))
        model, calls = _model(weights), []

        def recorded(*inputs: Tensor) -> Tensor:
            calls.append((inputs, model(*inputs)))
            return calls[-1][1]

        return cls(weights, captions, generate(recorded, captions, seed=2, batch=seeds), calls)

    def measure(self, recipe: str, method: str, nbytes: int, weights: Weights, quantized: set[str]) -> Quality:
        model = _model(weights)
        clips = generate(model, self.captions, seed=2, batch=len(self.captions))
        latent = _psnr(self.clips, clips)
        motion = _psnr(self.clips.diff(dim=2), clips.diff(dim=2))
        colour, direction = right(clips, self.captions).float().mean(0).tolist()
        noise = sum(float((weights[name] - self.weights[name]).square().sum()) for name in quantized)
        power = sum(float(self.weights[name].square().sum()) for name in quantized)
        return Quality(
            recipe=recipe,
            method=method,
            nbytes=nbytes,
            weight_sqnr=_db(power / noise),
            velocity_sqnr=tuple(self._step(model, call) for call in self.calls),
            latent_psnr=latent.mean().item(),
            latent_spread=latent.std().item(),
            motion_psnr=motion.mean().item(),
            motion_spread=motion.std().item(),
            colour=colour,
            motion=direction,
        )

    @torch.no_grad()
    def _step(self, model: Model, call: tuple[tuple[Tensor, Tensor, Tensor], Tensor]) -> float:
        inputs, expected = call
        return _db((expected.square().sum() / (model(*inputs) - expected).square().sum()).item())


def load_weights() -> dict[str, Tensor]:
    """TinyWan's, float32."""
    return {name: tensor.float() for name, tensor in load_file(CHECKPOINT).items()}


def _model(weights: Weights) -> Model:
    model = build()
    model.load_state_dict(dict(weights))
    return velocity(model.eval())


def _db(ratio: float) -> float:
    return 10 * math.log10(ratio)


def _psnr(reference: Tensor, clips: Tensor) -> Tensor:
    """(clips,) in dB; the peak is the range of the reference."""
    peak = reference.max() - reference.min()
    return 10 * torch.log10(peak**2 / (clips - reference).square().mean((1, 2, 3, 4)))


@torch.no_grad()
def collect(weights: Weights, prompts: int) -> Importance:
    """An importance matrix from sampling with captions that TinyWan knows; other seeds than those measured."""
    model, collector = build(), Collector()
    model.load_state_dict(dict(weights))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(partial(_add, collector, f"{name}.weight"))
    generate(velocity(model.eval()), TRAINING[:: len(TRAINING) // prompts][:prompts], seed=3)
    collector.samples = prompts
    return collector.result()


def _add(collector: Collector, name: str, _: torch.nn.Module, inputs: tuple[Tensor]) -> None:
    collector.add(name, inputs[0])


def quantize(folder: Path, recipe: str, method: str, importance: Importance) -> tuple[int, Weights, set[str]]:
    """The file's size, all weights as they come out of it, and the names of the quantized ones."""
    path = folder / f"{recipe}-{method}.gguf"
    chosen = importance if method == "importance" else None
    # ggml's encoders get the very types that the plain file has.
    report = convert(CHECKPOINT, path, recipe, importance=chosen, effort="fast" if method == "ggml" else "best")
    tensors = open_gguf(path).tensors
    quantized = {name for name, tensor in tensors.items() if tensor.qtype.block_size > 1}
    weights = {name: tensor.dequantize().clone() for name, tensor in tensors.items()}
    if method == "ggml":
        library, source = load_libggml(), load_weights()
        for name in quantized:
            qtype = tensors[name].qtype.name
            packed = library.quantize(qtype, source[name].numpy())
            weights[name] = torch.from_numpy(library.dequantize(qtype, packed))
    return report.nbytes, weights, quantized


def measure(recipes: tuple[str, ...], seeds: int, prompts: int) -> list[Quality]:
    """Every recipe with every method."""
    reference = Reference.sample(seeds)
    importance = collect(reference.weights, prompts)
    with tempfile.TemporaryDirectory() as folder:
        return [
            reference.measure(recipe, method, *quantize(Path(folder), recipe, method, importance))
            for recipe in recipes
            for method in METHODS
        ]


def draw(rows: list[dict[str, object]], path: Path) -> None:
    """Error by size, a line a method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=100, layout="constrained")
    axis = figure.add_subplot()
    names = {"ggml": "ggml's encoders", "plain": "WanQuant", "importance": "WanQuant with importance"}
    for method, label in names.items():
        line = sorted((row for row in rows if row["method"] == method), key=lambda row: row["nbytes"])
        size = [row["nbytes"] / 1e6 for row in line]
        psnr, spread = [row["latent_psnr"] for row in line], [row["latent_spread"] for row in line]
        axis.errorbar(size, psnr, spread, marker="o", capsize=3, alpha=0.8, label=label)
    for row in rows:
        if row["method"] == "plain":
            axis.annotate(
                row["recipe"], (row["nbytes"] / 1e6, row["latent_psnr"]), (6, -12), textcoords="offset points"
            )
    axis.set_xlabel("file, MB")
    axis.set_ylabel("PSNR of the latent, dB")
    axis.set_title("TinyWan: quantized against bfloat16, same seeds")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="dev.py bench quality", description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=8, help="captions that the importance matrix is made of")
    parser.add_argument("--plot", type=Path, help="where to draw error by size (PNG)")
    options = parser.parse_args()
    rows = [asdict(row) for row in measure(tuple(options.recipes), options.seeds, options.prompts)]
    if options.plot:
        draw(rows, options.plot)
    if options.json:
        settings = {"machine": machine(), "seeds": options.seeds, "prompts": options.prompts}
        print(json.dumps({**settings, "rows": rows}, indent=2))
        return
    print("| recipe | encoder | MB | weights, dB | latent PSNR, dB | motion PSNR, dB | colour | motion |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        latent, motion = (f"{row[f'{name}_psnr']:.1f} ± {row[f'{name}_spread']:.1f}" for name in ("latent", "motion"))
        cells = (row["recipe"], row["method"], f"{row['nbytes'] / 1e6:.2f}", f"{row['weight_sqnr']:.1f}")
        print(f"| {' | '.join(cells)} | {latent} | {motion} | {row['colour']:.0%} | {row['motion']:.0%} |")


if __name__ == "__main__":
    main()
