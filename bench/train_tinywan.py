"""Training of TinyWan, a Wan 2.1 T2V of 5 million parameters, on drawn clips; continues an interrupted run."""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from wanquant.bench.tinywan.data import (
    HELD_OUT,
    SIZE,
    TRAINING,
    draw,
    embed,
    noise_level,
    to_latent,
    to_pictures,
    word_embeddings,
)
from wanquant.bench.tinywan.model import Model, build, velocity
from wanquant.bench.tinywan.pictures import draw_clips
from wanquant.bench.tinywan.score import generate, right
from wanquant.ops.conditioning import save_conditioning
from wanquant.testing.hosts import ROOT


@dataclass(frozen=True)
class Settings:
    """The settings that determine the result; a run resumes only with the same ones."""

    steps: int
    batch: int
    rate: float
    seed: int
    small: float = 0.41
    """Share of the steps, at the start, that see four clips of half the size instead of one, to see more per hour."""
    uncaptioned: float = 0.05
    warmup: int = 50
    decay: float = 0.995


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> object: ...


def loss_of_step(call: Model, settings: Settings, step: int) -> Tensor:
    """Return the mean squared error of the velocity (noise minus clip), on clips that depend only on seed and step."""
    generator = torch.Generator().manual_seed(settings.seed << 32 | step)
    size, count = (SIZE // 2, 4 * settings.batch) if step < settings.small * settings.steps else (SIZE, settings.batch)
    chosen = torch.randint(len(TRAINING), (count,), generator=generator).tolist()
    captions = [TRAINING[index] for index in chosen]
    clips, text = to_latent(draw(captions, generator, size)), embed(captions)
    text[torch.rand(count, generator=generator) < settings.uncaptioned] = 0
    noise = torch.randn(clips.shape, generator=generator)
    level = _levels(count, generator)
    mixture = torch.lerp(clips, noise, level.view(-1, 1, 1, 1, 1))
    return (call(mixture, 1000 * level, text) - (noise - clips)).square().mean()


def _levels(count: int, generator: torch.Generator) -> Tensor:
    """Draw noise levels (count,), mostly where all frames together, but not a single one, show where the shape is."""
    # One draw from each of `count` equal parts makes the loss less noisy than free draws.
    share = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    decisive = torch.rand(count, generator=generator) < 0.7
    return torch.where(decisive, 0.7 + 0.27 * share, noise_level(share, shift=5))


def train(settings: Settings, folder: Path, device: str, every: int) -> torch.nn.Module:
    """Run the remaining steps of the state in `folder`, and return the averaged model.

    Args:
        every: steps between two saved states and log lines.
    """
    model = build(settings.seed, training=True).to(device)
    average = build(settings.seed).to(device).requires_grad_(False)
    optimizer = torch.optim.AdamW(_groups(model, settings.rate), betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    shares = [group["lr"] / settings.rate for group in optimizer.param_groups]
    parts = {"model": model, "average": average, "optimizer": optimizer}
    first = _resume(folder / "state.pt", settings, parts)
    started, losses = time.monotonic(), []
    for step in range(first, settings.steps):
        for group, share in zip(optimizer.param_groups, shares, strict=True):
            group["lr"] = share * settings.rate * _share_of_rate(settings, step)
        with sdpa_kernel(SDPBackend.MATH):  # twice as fast as the fused kernel for so few tokens
            loss = loss_of_step(velocity(model, torch.bfloat16), settings, step)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        # The average must soon forget the random start.
        decay = min(settings.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        losses.append(loss.item())
        if (step + 1) % every == 0 or step + 1 == settings.steps:
            _save(folder / "state.pt", settings, step + 1, parts)
            pace = (time.monotonic() - started) / (step + 1 - first)
            _log(folder, {"step": step + 1, "loss": sum(losses) / len(losses), "seconds": pace, **score(average, 16)})
            losses.clear()
    return average


def _share_of_rate(settings: Settings, step: int) -> float:
    """Return the share of the rate: linear warm-up, constant, and a linear decay to 0 over the last 30 % of steps."""
    return min(1.0, (step + 1) / settings.warmup, (1 - step / settings.steps) / 0.3)


def _groups(model: torch.nn.Module, rate: float) -> list[dict[str, Any]]:
    """Group the parameters by their rate.

    A step of Adam moves every weight by the same amount, so the 4096 weights of one word together move its activations
    by tens. At the full rate this would permanently silence words that do not matter yet.
    """
    words = model.text_embedding[0].weight
    others = [parameter for parameter in model.parameters() if parameter is not words]
    return [{"params": others, "lr": rate}, {"params": [words], "lr": rate / 64}]


def score(model: torch.nn.Module, prompts: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
    """Return the shares of clips of held-out captions with the right color, motion, and both."""
    captions = [HELD_OUT[index % len(HELD_OUT)] for index in range(prompts)]
    found = right(generate(velocity(model, dtype), captions, seed=1), captions)
    colour, motion = found.float().mean(0).tolist()
    return {"colour": colour, "motion": motion, "both": found.all(1).float().mean().item()}


def _resume(path: Path, settings: Settings, parts: dict[str, Stateful]) -> int:
    """Load the state of an earlier run, if there is one, and return its number of steps."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    if state["settings"] != asdict(settings):
        raise SystemExit(
            f"{path}: the run was begun with {state['settings']}, got {asdict(settings)}: "
            "use the same options or another --folder"
        )
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return int(state["step"])


def _save(path: Path, settings: Settings, step: int, parts: dict[str, Stateful]) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(
        {"settings": asdict(settings), "step": step} | {name: part.state_dict() for name, part in parts.items()},
        temporary,
    )
    os.replace(temporary, path)


def _log(folder: Path, line: dict[str, float]) -> None:
    text = json.dumps({key: round(value, 4) for key, value in line.items()})
    print(text, flush=True)
    with open(folder / "log.jsonl", "a") as file:
        file.write(text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="dev.py bench train-tinywan", description=__doc__)
    parser.add_argument("--steps", type=int, default=7100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=200, help="steps between two saved states")
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "tinywan", help="folder of state, log and result")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    settings = Settings(options.steps, options.batch, options.rate, options.seed)
    model = train(settings, options.folder, options.device, options.every)
    path = options.folder / "tinywan.safetensors"
    save_file({name: value.to("cpu", torch.bfloat16) for name, value in model.state_dict().items()}, path)
    (options.folder / "words").mkdir(exist_ok=True)
    for word, embedding in word_embeddings().items():
        save_conditioning(
            [[embedding.bfloat16().view(1, 1, -1), {}]], str(options.folder / "words" / f"{word}.safetensors")
        )
    captions = HELD_OUT[:16]
    clips = generate(velocity(model, torch.bfloat16), captions, seed=1)
    draw_clips(to_pictures(clips), captions, options.folder / "clips.png")
    print(f"{path}: share of right clips among 64 of held-out captions: {score(model, 64)}")


if __name__ == "__main__":
    main()
