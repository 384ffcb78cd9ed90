"""One block: its run with any weights, the inputs of its layers, and its tuning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from ..conversion.layer_encoder import LayerEncoder
from ..qtype import Effort, QuantType
from ..statistics.calibration import CalibrationCollector
from .capture import CapturedCalls
from .factor_gains import FactorGains
from .states import Chains, ReadState

Weights = Mapping[str, Tensor]
"""The tensors of a block by their names in it: float32, on the device of the tuning."""

# Of Adam, for gains and for the tensors that are not quantized. Larger ones lose what the rounding has found.
_RATE = 1e-4


@dataclass(frozen=True)
class BlockModule:
    """The code of a model's blocks, without weights: all blocks of a model share it.

    Args:
        module: computes in float32; its own parameters are not used.
        options: further arguments of each call.
        training: a context in which the module has gradients.
    """

    module: torch.nn.Module
    options: Mapping[str, Any] = field(default_factory=dict)
    training: Callable[[], AbstractContextManager[None]] = nullcontext

    def __call__(self, weights: Weights, hidden: Tensor, others: Mapping[str, Any]) -> Tensor:
        """Run a block.

        Args:
            hidden: float32, (batch, tokens, channels).
            others: the other arguments of the call.

        Returns:
            The hidden state after the block: float32, of the shape of `hidden`.
        """
        output: Tensor = functional_call(self.module, dict(weights), (hidden,), {**others, **self.options})
        return output

    @property
    def layers(self) -> list[str]:
        """The names of the Linears."""
        return [name for name, layer in self.module.named_modules() if hasattr(layer, "in_features")]

    @contextmanager
    def collecting(self, collector: CalibrationCollector) -> Iterator[None]:
        """Add the inputs of all Linears to a collector until the context ends."""
        hooks = [
            self.module.get_submodule(name).register_forward_pre_hook(
                lambda _, inputs, name=name: collector.add(f"{name}.weight", inputs[0])
            )
            for name in self.layers
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@dataclass(frozen=True)
class TunedBlock:
    """The result of `BlockTuning.run`."""

    packed: Mapping[str, Tensor]
    """By name, the bytes of the quantized weights: uint8, (out_features, bytes per row)."""
    weights: Weights
    """All tensors of the block as a file with these bytes has them."""


@dataclass(frozen=True)
class BlockTuning:
    """The tuning of one block.

    Args:
        block: the code of the block.
        source: the unquantized tensors.
        types: the types of the weights that are to be quantized, by name.
        calls: the captured calls.
        chains: the hidden states before the block.
        step: is called before every pass through the block.
    """

    block: BlockModule
    source: Weights
    types: Mapping[str, QuantType]
    calls: CapturedCalls
    chains: Chains
    device: torch.device
    step: Callable[[], None]

    @staticmethod
    def passes(n_calls: int, steps: int) -> int:
        """Return how often `run` and the states after it call `step`, for that many calls and steps."""
        return 3 * n_calls + steps

    def run(self, effort: Effort, steps: int) -> TunedBlock:
        """Round the block for the inputs that the blocks before it give, and tune it for its unquantized output.

        Args:
            effort: of the rounding.
            steps: of the optimization.
        """
        packed = self._rounded(effort)
        gained = {name: FactorGains(self.types[name], blocks) for name, blocks in packed.items()}
        free = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in self.source.items() if name not in packed}
        self._optimize(gained, free, steps)
        packed = {name: gains.packed() for name, gains in gained.items()}
        dequantized = {name: self.types[name].dequantize(blocks) for name, blocks in packed.items()}
        return TunedBlock(packed, {**{name: tensor.detach() for name, tensor in free.items()}, **dequantized})

    def after(self, weights: Weights, state: ReadState) -> ReadState:
        """Return the states after the block with some weights, from those before it."""

        def read(index: int) -> Tensor:
            return self._output(weights, state, index)

        return read

    @torch.no_grad()
    def _output(self, weights: Weights, state: ReadState, index: int) -> Tensor:
        self.step()
        return self.block(weights, state(index).to(self.device), self.calls.others(index, self.device))

    def _rounded(self, effort: Effort) -> dict[str, Tensor]:
        collector = CalibrationCollector()
        with self.block.collecting(collector):
            for index in range(len(self.calls)):
                self._output(self.source, self.chains.quantized, index)
                collector.samples += 1
        calibration = collector.result()
        return {
            name: LayerEncoder.of(calibration, name).to(self.device).quantize(qtype, self.source[name], effort)
            for name, qtype in self.types.items()
        }

    def _optimize(self, gained: Mapping[str, FactorGains], free: Mapping[str, Tensor], steps: int) -> None:
        trained = [*free.values(), *(each.gains for each in gained.values() if each.gains.requires_grad)]
        optimizer = torch.optim.Adam(trained, lr=_RATE, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
        generator = torch.Generator().manual_seed(0)
        for index in torch.randint(len(self.calls), (steps,), generator=generator).tolist():
            wanted = self._output(self.source, self.chains.exact, index)
            given, others = self.chains.quantized(index).to(self.device), self.calls.others(index, self.device)
            with self.block.training(), torch.enable_grad():
                output = self.block({**free, **{name: each() for name, each in gained.items()}}, given, others)
                loss = (output - wanted).square().sum() / (wanted - given).square().sum()
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
