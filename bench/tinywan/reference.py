"""The clips of unquantized TinyWan, and the errors of other weights on the same seeds."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import torch
from safetensors.torch import load_file
from torch import Tensor

from wanquant.bench.comparison import Gain, Products
from wanquant.bench.harness import machine
from wanquant.bench.tinywan.activations import Rounding, quantize_inputs
from wanquant.bench.tinywan.data import HELD_OUT, TRAINING, Caption
from wanquant.bench.tinywan.model import Model, build, velocity
from wanquant.bench.tinywan.score import generate, right
from wanquant.quant.statistics.importance import Collector, Importance
from wanquant.testing.hosts import ROOT

CHECKPOINT = ROOT / "bench" / "tinywan" / "tinywan.safetensors"
STEPS = 8
SEED, CALIBRATION_SEED = 2, 3
# Distance between the seeds of two draws, so that none equals the seed of a calibration.
_SEEDS = 100
# Distance between chosen captions. They are sorted by word, so that a multiple of 3 would miss some motions.
_STRIDE = 7
# Clips whose steps are compared one by one; they have 300 thousand values per step.
_STEP_CLIPS = 4

Weights = Mapping[str, Tensor]
Inputs = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Errors:
    """Errors against the unquantized model on the same seeds.

    Attributes:
        velocity_sqnr: in dB, by step, each from the unquantized model's latent.
        latent_psnr: in dB, by clip.
        motion_psnr: in dB, by clip, of the differences between neighboring frames, which show flicker.
        colour: the share of clips with the color of the caption.
        motion: the share of clips with the motion of the caption.
    """

    velocity_sqnr: tuple[float, ...]
    latent_psnr: tuple[float, ...]
    motion_psnr: tuple[float, ...]
    colour: float
    motion: float

    @property
    def means(self) -> dict[str, float]:
        """Return the values in dB that files are compared by."""
        clips = {"latent": fmean(self.latent_psnr), "motion": fmean(self.motion_psnr)}
        return {"velocity": fmean(self.velocity_sqnr), **clips}


def gains(files: Sequence[Errors], peers: Sequence[Errors]) -> dict[str, Gain]:
    """Return the gain in each of the `means`, comparing file by file."""
    pairs = [(file.means, peer.means) for file, peer in zip(files, peers, strict=True)]
    return {key: Gain.of([ours[key] - theirs[key] for ours, theirs in pairs]) for key in pairs[0][0]}


@dataclass(frozen=True)
class Reference:
    """The clips of the unquantized model, and its inputs and outputs in every step."""

    captions: tuple[Caption, ...]
    seed: int
    clips: Tensor
    calls: Sequence[tuple[Inputs, Tensor]]

    @classmethod
    def sample(cls, clips: int, draw: int = 0) -> Reference:
        """Sample clips; each draw has its own seed and the next captions."""
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
        """Return the means of x x^T over the inputs x of every Linear in sampling these clips.

        Each x ends with a 1, for the bias: (columns + 1, columns + 1).
        """
        (products,) = collect(weights, self.captions, Products(), seed=self.seed)
        return products

    @torch.no_grad()
    def velocity_sqnr(self, model: Model) -> list[float]:
        return [sqnr(expected, model(*inputs)) for inputs, expected in self.calls]


def origin() -> dict[str, str]:
    """Return the machine, and the beginning of the checkpoint's SHA-256."""
    return {"machine": machine(), "checkpoint": checkpoint_hash()}


def checkpoint_hash() -> str:
    return hashlib.sha256(CHECKPOINT.read_bytes()).hexdigest()[:16]


def load_weights() -> dict[str, Tensor]:
    """Return TinyWan's weights in float32."""
    return {name: tensor.float() for name, tensor in load_file(CHECKPOINT).items()}


def load_model(weights: Weights, inputs: Mapping[str, Rounding] | None = None) -> Model:
    """Return the model of these weights.

    Args:
        inputs: what quantizes the inputs of layers, by the names of their weights.
    """
    module = load_module(weights)
    quantize_inputs(module, inputs or {})
    return velocity(module)


def sqnr(reference: Tensor, values: Tensor) -> float:
    """Return the SQNR in dB of float tensors of equal shape."""
    return 10 * math.log10((reference.square().sum() / (values - reference).square().sum()).item())


def psnr(reference: Tensor, clips: Tensor) -> Tensor:
    """Return the PSNR of every clip in dB: (clips,); the signal is the range of the reference.

    Args:
        reference: float32, (clips, channels, frames, height, width).
        clips: of the same shape.
    """
    peak = reference.max() - reference.min()
    return 10 * torch.log10(peak**2 / (clips - reference).square().mean((1, 2, 3, 4)))


def collect(
    weights: Weights,
    captions: Sequence[Caption],
    *collectors: Collector,
    seed: int = CALIBRATION_SEED,
    wanted: Callable[[float], bool] = lambda level: True,
) -> list[Importance]:
    """Sample one clip per caption, and return what each collector collected; `wanted` selects steps by noise level."""
    model, counted = load_module(weights), True

    def add(name: str, _: torch.nn.Module, inputs: tuple[Tensor]) -> None:
        if counted:
            for collector in collectors:
                collector.add(name, inputs[0])

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(partial(add, f"{name}.weight"))
    call = velocity(model)

    def observed(x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        nonlocal counted
        counted = wanted(timestep[0].item() / 1000)
        for collector in collectors:
            collector.samples += len(x) * counted
        return call(x, timestep, text)

    generate(observed, captions, seed=seed, steps=STEPS)
    return [collector.result() for collector in collectors]


def prompts(count: int, start: int = 0) -> list[Caption]:
    """Return captions of the training set; measurements use none of these."""
    return [TRAINING[(start + index * _STRIDE) % len(TRAINING)] for index in range(count)]


def load_module(weights: Weights) -> torch.nn.Module:
    model = build()
    model.load_state_dict(dict(weights))
    return model.eval()
