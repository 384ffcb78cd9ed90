"""Quantization-aware tuning after calibrated rounding, one transformer block at a time.

Each block learns to reproduce its unquantized output from the output of the tuned blocks before it. In every step its
weights are rounded to their GGUF type, and the gradient passes through the rounding unchanged.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.func import functional_call

from wanquant.bench.tinywan.data import Caption
from wanquant.bench.tinywan.encodings import Workshop
from wanquant.bench.tinywan.reference import Reference, Weights, load_model, load_module, prompts
from wanquant.quant import open_gguf
from wanquant.quant.encoders.search import Encoder
from wanquant.quant.encoders.search.sub_blocks import SubBlocks
from wanquant.quant.qtype import QuantType
from wanquant.research._shared import RESULTS, Call, Pair, block_inputs, run

import comfy.model_management  # isort: skip (wanquant.bench.tinywan puts the host on the path)

# Optimization steps per block, and the number of them between two fits of the scales.
_STEPS, _REFIT = 64, 16
# The learning rate of a weight, relative to the RMS rounding error of its tensor.
_RATE = 0.004


class Tuned(torch.nn.Module):
    """A weight that is trained through its rounding, whose gradient is taken to be 1.

    Args:
        weight: float32, (rows, columns).
        importance: float32, (columns,).

    Source: straight-through estimation, arXiv 1308.3432.
    """

    def __init__(self, qtype: QuantType, weight: Tensor, importance: Tensor) -> None:
        super().__init__()
        self.encode, self.block_size, self.importance = cast(Encoder, qtype.best), qtype.block_size, importance
        self.latent = torch.nn.Parameter(weight.clone())
        self.refit()

    @torch.no_grad()
    def refit(self) -> None:
        """Fit the scales to the current weight."""
        self.found = self.encode.fit_scales(self._sub_blocks(), self.latent.numel() // self.block_size)

    def forward(self) -> Tensor:
        return self.latent + (self.rounded() - self.latent).detach()

    @torch.no_grad()
    def rounded(self) -> Tensor:
        """Return the weight that a file would hold: float32, (rows, columns)."""
        q, _ = self.found.round(self._sub_blocks(), self.encode.levels)
        scale, minimum = self.found.effective()
        return (q * scale - minimum).t().reshape(self.latent.shape)

    def _sub_blocks(self) -> SubBlocks:
        blocks = self.latent.detach().view(-1, self.block_size)
        importance = self.importance.expand_as(self.latent).reshape_as(blocks)
        return SubBlocks.from_blocks(blocks, importance, self.encode.size)


class Block(NamedTuple):
    """A block to tune, its calls, the tokens of each call, and the unquantized output for each call."""

    module: torch.nn.Module
    calls: Sequence[Call]
    given: Sequence[Tensor]
    wanted: Sequence[Tensor]

    def run(self, weights: Weights, item: int) -> Tensor:
        output: Tensor = functional_call(self.module, dict(weights), (self.given[item],), self.calls[item].others)
        return output

    def tune(self, tuned: Mapping[str, Tuned], rates: Mapping[str, float], steps: int) -> dict[str, Tensor]:
        """Run `steps` steps of Adam and return the rounded weights."""
        groups = [{"params": [tensor.latent], "lr": rates[name]} for name, tensor in tuned.items()]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        order = torch.randint(len(self.calls), (steps,), generator=torch.Generator().manual_seed(0)).tolist()
        for step, item in enumerate(order):
            if step % _REFIT == 0:
                for tensor in tuned.values():
                    tensor.refit()
            change = (self.wanted[item] - self.given[item]).square().sum()
            output = self.run({name: tensor() for name, tensor in tuned.items()}, item)
            loss = (output - self.wanted[item]).square().sum() / change
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return {name: tensor.rounded() for name, tensor in tuned.items()}


def tune(
    weights: Weights,
    start: Weights,
    types: Mapping[str, QuantType],
    importance: Mapping[str, Tensor],
    captions: Sequence[Caption],
) -> Weights:
    """Tune all blocks, one after the other, and return the new weights.

    Args:
        weights: the unquantized weights, float32.
        start: the dequantized weights of a calibrated file.
        types: of the quantized weights.
        importance: by weight, float32, (columns,).
        captions: one clip of each is sampled to tune on.
    """
    model = load_module(weights).requires_grad_(False)
    calls, final = block_inputs(model, captions), dict(start)
    exact = given = [call.tokens for call in calls]
    for index, module in enumerate(model.blocks):
        with torch.no_grad():
            exact = [module(tokens, **call.others) for tokens, call in zip(exact, calls, strict=True)]
        block = Block(module, calls, given, exact)
        names = {local: f"blocks.{index}.{local}" for local, _ in module.named_parameters()}
        names = {local: name for local, name in names.items() if name in types}
        tuned = {local: Tuned(types[name], start[name], importance[name]) for local, name in names.items()}
        rates = {local: _RATE * _rms(start[name] - weights[name]) for local, name in names.items()}
        with _training():
            rounded = block.tune(tuned, rates, _STEPS)
        final |= {names[local]: tensor for local, tensor in rounded.items()}
        with torch.no_grad():
            given = [block.run(rounded, item) for item in range(len(calls))]
    return final


@contextmanager
def _training() -> Iterator[None]:
    """Select ComfyUI's slower kernel for rotary embeddings, which has a backward pass."""
    before, comfy.model_management.in_training = comfy.model_management.in_training, True
    try:
        yield
    finally:
        comfy.model_management.in_training = before


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def measure(recipes: Sequence[str], roundings: int, clips: int, captions: int) -> dict[str, list[Pair]]:
    """Return the errors of calibrated and of tuned files, by recipe."""
    pairs = defaultdict(list)
    for order in range(roundings):
        reference = Reference.sample(clips, order)
        with Workshop.open(prompts(captions), order) as workshop:
            for recipe in recipes:
                file = workshop.calibrated(recipe)
                tensors = open_gguf(workshop.path(recipe, workshop.calibration)).tensors
                types = {name: tensors[name].qtype for name in file.quantized}
                tuned = tune(workshop.source, file.weights, types, workshop.calibration, prompts(captions))
                pairs[recipe].append((reference.errors(load_model(file.weights)), reference.errors(load_model(tuned))))
    return pairs


def main() -> None:
    defaults = {"recipes": ["Q4_K_M", "Q3_K_M", "Q2_K"], "roundings": 3, "seeds": 8, "prompts": 8}
    run(__doc__, RESULTS / "tuning.json", measure, **defaults)


if __name__ == "__main__":
    main()
