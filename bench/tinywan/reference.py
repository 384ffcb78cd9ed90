"""What TinyWan draws unquantized, and how far other weights lead from it on the same seeds."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, stdev

import torch
from safetensors.torch import load_file
from torch import Tensor

from wanquant.bench.harness import machine
from wanquant.bench.tinywan.data import HELD_OUT, TRAINING, Caption
from wanquant.bench.tinywan.model import Model, build, velocity
from wanquant.bench.tinywan.score import generate, right
from wanquant.quant.statistics.importance import Collector, Importance
from wanquant.testing.hosts import ROOT

CHECKPOINT = ROOT / "bench" / "tinywan" / "tinywan.safetensors"
STEPS = 8
SEED, CALIBRATION_SEED = 2, 3
# How far apart the seeds of two draws are, so that none is one that calibrates or tunes.
_SEEDS = 100
# Between captions. They are ordered by their words; with a multiple of 3 between them, few motions would be seen.
_STRIDE = 7
# Clips whose steps are compared one by one; they have 300 thousand values a step.
_STEP_CLIPS = 4

Weights = Mapping[str, Tensor]
Inputs = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Spread:
    """A mean, mostly over clips, and their standard deviation, in dB; it is NaN of a single value."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(fmean(values), stdev(values) if len(values) > 1 else math.nan)

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.deviation:.1f}"


@dataclass(frozen=True)
class Gain:
    """By how many dB files are closer than their peers: a mean, and its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Gain:
        spread = Spread.of(values)
        return cls(spread.mean, spread.deviation / len(values) ** 0.5)

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ± {self.error:.2f}"


@dataclass(frozen=True)
class Errors:
    """Of clips against the unquantized model's, on the same seeds."""

    velocity_sqnr: tuple[float, ...]
    """dB, of every step, on the unquantized model's way."""
    latent_psnr: tuple[float, ...]
    """dB, of every clip."""
    motion_psnr: tuple[float, ...]
    """Of the differences between neighbouring frames: what flickers counts here."""
    colour: float
    motion: float
    """Shares of the clips with the colour, and with the motion, of the caption."""

    @property
    def means(self) -> dict[str, float]:
        """What files are compared by, in dB."""
        clips = {"latent": fmean(self.latent_psnr), "motion": fmean(self.motion_psnr)}
        return {"velocity": fmean(self.velocity_sqnr), **clips}


def gains(files: Sequence[Errors], peers: Sequence[Errors]) -> dict[str, Gain]:
    """Of each of the `means`, files being compared one by one."""
    pairs = [(file.means, peer.means) for file, peer in zip(files, peers, strict=True)]
    return {key: Gain.of([ours[key] - theirs[key] for ours, theirs in pairs]) for key in pairs[0][0]}


class _Products(Collector):
    @staticmethod
    def measure(inputs: Tensor) -> Tensor:
        rows = inputs.reshape(-1, inputs.shape[-1])
        return rows.mT @ rows


@dataclass(frozen=True)
class Reference:
    """The unquantized model's clips, and on the way to them what it was given and what it gave, step by step."""

    captions: tuple[Caption, ...]
    seed: int
    clips: Tensor
    calls: Sequence[tuple[Inputs, Tensor]]

    @classmethod
    def sample(cls, clips: int, draw: int = 0) -> Reference:
        """So many clips, of another seed and of the next captions in each draw."""
        captions = tuple(HELD_OUT[(draw * clips + index) % len(HELD_OUT)] for index in range(clips))
        seed = SEED + _SEEDS * draw
        model, calls = load_model(load_weights()), []

        def recorded(*inputs: Tensor) -> Tensor:
            output = model(*inputs)
            x, t, text = (tensor[:_STEP_CLIPS] for tensor in inputs)
            calls.append(((x, t, text), output[:_STEP_CLIPS]))
            return output

        return cls(captions, seed, generate(recorded, captions, seed=seed, steps=STEPS, batch=clips), calls)

    def errors(self, model: Model) -> Errors:
        clips = self.generate(model)
        colour, direction = right(clips, self.captions).float().mean(0).tolist()
        return Errors(
            velocity_sqnr=tuple(self.velocity_sqnr(model)),
            latent_psnr=tuple(psnr(self.clips, clips).tolist()),
            motion_psnr=tuple(psnr(self.clips.diff(dim=2), clips.diff(dim=2)).tolist()),
            colour=colour,
            motion=direction,
        )

    def generate(self, model: Model) -> Tensor:
        return generate(model, self.captions, seed=self.seed, steps=STEPS, batch=len(self.captions))

    def products(self, weights: Weights) -> Importance:
        """Means of x x^T, of all inputs x of every Linear on the way to these clips, with these weights."""
        return collect(weights, self.captions, _Products(), seed=self.seed)

    @torch.no_grad()
    def velocity_sqnr(self, model: Model) -> list[float]:
        return [sqnr(expected, model(*inputs)) for inputs, expected in self.calls]


def origin() -> dict[str, str]:
    """Return the machine, and the beginning of the checkpoint's SHA-256."""
    return {"machine": machine(), "checkpoint": hashlib.sha256(CHECKPOINT.read_bytes()).hexdigest()[:16]}


def load_weights() -> dict[str, Tensor]:
    """TinyWan's, float32."""
    return {name: tensor.float() for name, tensor in load_file(CHECKPOINT).items()}


def load_model(weights: Weights) -> Model:
    return velocity(load_module(weights))


def sqnr(reference: Tensor, values: Tensor) -> float:
    """In dB."""
    return 10 * math.log10((reference.square().sum() / (values - reference).square().sum()).item())


def psnr(reference: Tensor, clips: Tensor) -> Tensor:
    """(clips,) in dB; the peak is the range of the reference."""
    peak = reference.max() - reference.min()
    return 10 * torch.log10(peak**2 / (clips - reference).square().mean((1, 2, 3, 4)))


def collect(
    weights: Weights,
    captions: Sequence[Caption],
    collector: Collector,
    *,
    seed: int = CALIBRATION_SEED,
    wanted: Callable[[float], bool] = lambda level: True,
) -> Importance:
    """What the collector makes of sampling; `wanted` chooses the steps by their noise level."""
    model, counted = load_module(weights), True

    def add(name: str, _: torch.nn.Module, inputs: tuple[Tensor]) -> None:
        if counted:
            collector.add(name, inputs[0])

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(partial(add, f"{name}.weight"))
    call = velocity(model)

    def observed(x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        nonlocal counted
        counted = wanted(timestep[0].item() / 1000)
        collector.samples += len(x) * counted
        return call(x, timestep, text)

    generate(observed, captions, seed=seed, steps=STEPS)
    return collector.result()


def prompts(count: int, start: int = 0) -> list[Caption]:
    """Captions that TinyWan learned, none of which is measured."""
    return [TRAINING[(start + index * _STRIDE) % len(TRAINING)] for index in range(count)]


def load_module(weights: Weights) -> torch.nn.Module:
    model = build()
    model.load_state_dict(dict(weights))
    return model.eval()
