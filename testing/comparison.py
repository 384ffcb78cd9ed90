"""Comparison of the same seed with and without quantization, in one server."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from wanquant.ops.conditioning import load_conditioning, save_conditioning
from wanquant.quant.plan.recipe import find_recipe
from wanquant.testing.graphs import PROMPT, SOURCE, dense_model, quantized_model, video
from wanquant.testing.hosts import ROOT
from wanquant.testing.server import Event, HostServer
from wanquant.testing.tiny_wan import write_tiny_wan

DENSE = "dense"
TINYWAN = ROOT / "bench" / "tinywan"
Progress = Callable[[str, str, int, int], None]
"""A function that takes the name of a run, the id of a node, its progress and its goal."""


@dataclass(frozen=True)
class Run:
    """The result of one sampling.

    Attributes:
        latent: float32, (1, channels, frames, height, width).
        outputs: the files of each output node, as /history lists them.
    """

    name: str
    latent: Tensor
    seconds_per_step: float
    nbytes: int
    outputs: dict[str, list[Path]]

    def sqnr_db(self, reference: Run) -> float:
        """Return the power of the reference latent over the power of the difference, in dB."""
        noise = (self.latent - reference.latent).square().sum().item()
        return 10 * math.log10(reference.latent.square().sum().item() / noise) if noise else math.inf


@dataclass(frozen=True)
class Scene:
    """A scene to sample, `pixels` high and wide; `prepare` puts its checkpoint and prompt in place."""

    prepare: Callable[[HostServer], None]
    pixels: int


def _prepare_random(server: HostServer) -> None:
    """Write a random checkpoint (dim 256, 4 layers, fixed seed) and a conditioning of the true width."""
    write_tiny_wan(server.models / "diffusion_models" / SOURCE, dim=256, ffn_dim=1024, layers=4, seed=0)
    generator = torch.Generator().manual_seed(0)
    # At unit scale the random cross-attention, which has no gate, would outweigh the latent.
    embedding = 0.1 * torch.randn(1, 16, 4096, generator=generator)
    save_conditioning([[embedding, {}]], str(server.models / "conditioning" / PROMPT))


def _prepare_trained(server: HostServer) -> None:
    """Copy TinyWan, and join the three words of a caption, each of which is a file."""
    shutil.copy(TINYWAN / "tinywan.safetensors", server.models / "diffusion_models" / SOURCE)
    words = [
        load_conditioning(str(TINYWAN / "words" / f"{word}.safetensors"))[0][0] for word in ("red", "ball", "right")
    ]
    save_conditioning([[torch.cat(words, dim=1), {}]], str(server.models / "conditioning" / PROMPT))


RANDOM, TRAINED = Scene(_prepare_random, 256), Scene(_prepare_trained, 128)


def sample(server: HostServer, scene: Scene, recipe: str, progress: Progress | None = None) -> Run:
    """Run the graph of one recipe, or of the unquantized checkpoint for `DENSE`, in a prepared scene."""
    clock = _StepClock(recipe, progress)
    graph = video(dense_model() if recipe == DENSE else quantized_model(recipe), recipe, scene.pixels)
    outputs = {node: _files(server, output) for node, output in server.run(graph, clock).items()}
    name = SOURCE if recipe == DENSE else f"{Path(SOURCE).stem}-{recipe}{find_recipe(recipe).suffix}"
    return Run(
        name=recipe,
        latent=load_file(outputs["latent"][0])["latent_tensor"],
        seconds_per_step=clock.seconds_per_step(),
        nbytes=(server.models / "diffusion_models" / name).stat().st_size,
        outputs=outputs,
    )


@dataclass
class _StepClock:
    """A listener to the websocket that notes when each sampling step ended."""

    run: str
    progress: Progress | None
    ends: list[float] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        if event["type"] != "progress":
            return
        data = event["data"]
        if data["node"] == "sampler":
            self.ends.append(time.monotonic())
        if self.progress:
            self.progress(self.run, data["node"], data["value"], data["max"])

    def seconds_per_step(self) -> float:
        # The first step is left out: loading the model is part of it.
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)


def _files(server: HostServer, output: dict[str, Any]) -> list[Path]:
    """Return the output files of one node, of whatever kind."""
    entries = [entry for kind in output.values() for entry in kind if isinstance(entry, dict) and "filename" in entry]
    return [server.output / entry["subfolder"] / entry["filename"] for entry in entries if entry["type"] == "output"]
