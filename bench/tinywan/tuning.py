"""Quantization-aware tuning, one block at a time: weights learn through their rounding what the block gave before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.func import functional_call

from wanquant.bench.tinywan.data import Caption
from wanquant.bench.tinywan.model import velocity
from wanquant.bench.tinywan.reference import STEPS, Weights, load_module
from wanquant.bench.tinywan.score import generate
from wanquant.quant.encoders.search import Encoder
from wanquant.quant.encoders.search.columns import Columns
from wanquant.quant.qtype import QuantType

import comfy.model_management  # isort: skip (wanquant.bench.tinywan puts the host on the path)

# Neither that of what is measured nor that of the calibration.
_SEED = 4
# Optimisation steps for each block, those between two fits of the scales, and clips that a step sees.
_STEPS, _REFIT, _CLIPS = 64, 16, 2
# How far a step moves a weight at most, of the error that rounding made in its tensor.
_RATE = 0.004


class Tuned(torch.nn.Module):
    """A weight (rows, columns) that is learned through the rounding of its type, the gradient of which is taken as 1.

    Source: straight-through estimation, arXiv 1308.3432.
    """

    def __init__(self, qtype: QuantType, weight: Tensor, importance: Tensor) -> None:
        super().__init__()
        self.encode, self.block_size, self.importance = cast(Encoder, qtype.best), qtype.block_size, importance
        self.latent = torch.nn.Parameter(weight.clone())
        self.refit()

    @torch.no_grad()
    def refit(self) -> None:
        """Fits the scales to the weight as it is now."""
        self.found = self.encode.fit(self._columns(), self.latent.numel() // self.block_size)

    def forward(self) -> Tensor:
        return self.latent + (self.rounded() - self.latent).detach()

    @torch.no_grad()
    def rounded(self) -> Tensor:
        """What a file would hold."""
        columns = self._columns()
        q, _ = self.found.nearest(columns, self.encode.levels)
        scale, minimum = self.found.lines()
        return (q * scale - minimum).t().reshape(self.latent.shape)

    def _columns(self) -> Columns:
        blocks = self.latent.detach().view(-1, self.block_size)
        return Columns.of(blocks, self.importance.expand_as(self.latent).reshape_as(blocks), self.encode.size)


class Call(NamedTuple):
    """What a block was given besides its tokens."""

    tokens: Tensor
    others: dict[str, Any]


def block_inputs(model: torch.nn.Module, captions: Sequence[Caption]) -> list[Call]:
    """Those of the first block while clips are drawn, a few clips at a time."""
    calls: list[tuple[Tensor, dict[str, Any]]] = []
    hook = model.blocks[0].register_forward_pre_hook(
        lambda _, inputs, others: calls.append((inputs[0], others)), with_kwargs=True
    )
    generate(velocity(model), captions, seed=_SEED, steps=STEPS, batch=len(captions))
    hook.remove()
    return [
        Call(tokens[part], {**others, "e": others["e"][part], "context": others["context"][part]})
        for tokens, others in calls
        for part in (slice(first, first + _CLIPS) for first in range(0, len(captions), _CLIPS))
    ]


class Block(NamedTuple):
    """A block in the making: what it is given, and what it gave unquantized."""

    module: torch.nn.Module
    calls: Sequence[Call]
    given: Sequence[Tensor]
    wanted: Sequence[Tensor]

    def run(self, weights: Weights, item: int) -> Tensor:
        output: Tensor = functional_call(self.module, dict(weights), (self.given[item],), self.calls[item].others)
        return output

    def tune(self, tuned: Mapping[str, Tuned], rates: Mapping[str, float], steps: int) -> dict[str, Tensor]:
        """The rounded weights after `steps` of Adam."""
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
    """`start`, the weights of a file of these `types`, with all blocks tuned one after the other.

    Each block learns to give what it gave with the unquantized `weights`, from what the tuned blocks before it give.
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
    """The host's kernel for rotary embeddings has no backward; it has a slower one for training."""
    before, comfy.model_management.in_training = comfy.model_management.in_training, True
    try:
        yield
    finally:
        comfy.model_management.in_training = before


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()
