"""One block: its run with any weights, the inputs of its layers, and its rounding in the order in which they run.

Calibrated rounding takes the inputs of a layer from the unquantized model. In the quantized model these inputs carry
the errors of all layers before. Here each layer is rounded for the inputs that the layers before it give once they are
rounded. A ridge regression first finds the weight whose outputs for these inputs are nearest to the unquantized ones.
The bias then makes the mean of each output right.

Source: GPTAQ (arXiv 2504.02692), whose asymmetric objective the regression solves before the rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from ..conversion.layer_encoder import LayerEncoder
from ..qtype import Effort, QuantType
from ..statistics.calibration import CalibrationCollector
from .capture import CapturedCalls
from .states import Chains, ReadState

Weights = Mapping[str, Tensor]
"""The tensors of a block by their names in it: float32, on the device of the tuning."""

# The ridge, relative to the mean square of the inputs. With less, the regression fits the few captured calls too well.
_RIDGE = 0.5


class _Seen(Exception):  # noqa: N818 - not an error
    """Raised to leave a block when the last wanted layer has been reached."""


@dataclass(frozen=True)
class BlockModule:
    """The code of a model's blocks, without weights: all blocks of a model share it.

    Args:
        module: computes in float32; its own parameters are not used.
        options: further arguments of each call.
    """

    module: torch.nn.Module
    options: Mapping[str, Any] = field(default_factory=dict)

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

    def inputs(
        self, layers: Sequence[str], weights: Weights, hidden: Tensor, others: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Return the inputs of some Linears in the order in which they run; what comes after the last does not run.

        Args:
            layers: the names of the Linears.
            hidden: float32, (batch, tokens, channels).

        Returns:
            By name, float32, of the shape that the layer gets.
        """
        seen: dict[str, Tensor] = {}

        def keep(name: str, inputs: Tensor) -> None:
            seen[name] = inputs
            if len(seen) == len(layers):
                raise _Seen

        hooks = [
            self.module.get_submodule(name).register_forward_pre_hook(lambda _, given, name=name: keep(name, given[0]))
            for name in layers
        ]
        try:
            self(weights, hidden, others)
        except _Seen:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    def stages(self, weights: Weights, hidden: Tensor, others: Mapping[str, Any]) -> list[list[str]]:
        """Return the Linears in the order in which they run; those of one stage have the same input.

        Args:
            hidden: float32, (batch, tokens, channels).
        """
        names = [name for name, layer in self.module.named_modules() if hasattr(layer, "in_features")]
        stages: list[list[str]] = []
        last: Tensor | None = None
        for name, given in self.inputs(names, weights, hidden, others).items():
            if given is not last:
                stages.append([])
            stages[-1].append(name)
            last = given
        return stages


@dataclass(frozen=True)
class TunedBlock:
    """The result of `BlockTuning.run`."""

    packed: Mapping[str, Tensor]
    """The bytes of the quantized weights by name: uint8, (out_features, bytes per row)."""
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
    step: Callable[[str], None]

    @torch.no_grad()
    def run(self, effort: Effort) -> TunedBlock:
        """Round the layers one after the other.

        Args:
            effort: of the rounding.
        """
        others = self.calls.others(0, self.device)
        stages = self.block.stages(self.source, self._state(self.chains.exact, 0), others)
        weights = dict(self.source)
        packed: dict[str, Tensor] = {}
        for stage in stages:
            if any(f"{layer}.weight" in self.types for layer in stage):
                packed |= self._round(stage, weights, effort)
        for name in self.types.keys() - packed.keys():
            packed[name] = LayerEncoder().quantize(self.types[name], self.source[name], effort)
            weights[name] = self.types[name].dequantize(packed[name])
        return TunedBlock(packed, weights)

    @torch.no_grad()
    def output(self, weights: Weights, state: ReadState) -> ReadState:
        """Return the states after the block with some weights, from those before it."""

        def read(index: int) -> Tensor:
            self.step("")
            with torch.no_grad():
                return self.block(weights, self._state(state, index), self.calls.others(index, self.device))

        return read

    def _state(self, state: ReadState, index: int) -> Tensor:
        return state(index).to(self.device)

    def _round(self, stage: Sequence[str], weights: dict[str, Tensor], effort: Effort) -> dict[str, Tensor]:
        """Round the layers of a stage, and put what a file with their bytes holds into `weights`."""
        has_bias = all(f"{layer}.bias" in weights for layer in stage)
        inputs, packed = self._inputs(stage, weights, has_bias=has_bias), {}
        for layer in stage:
            name, bias = f"{layer}.weight", f"{layer}.bias"
            qtype = self.types.get(name)
            if qtype is None:
                continue
            self.step(f", {layer}")
            wanted = inputs.corrected(self.source[name])
            packed[name] = inputs.encoder.quantize(qtype, wanted, effort)
            weights[name] = qtype.dequantize(packed[name])
            if has_bias:
                weights[bias] = weights[bias] + inputs.missing(self.source[name], weights[name])
        return packed

    def _inputs(self, stage: Sequence[str], weights: Weights, *, has_bias: bool) -> StageInputs:
        """Return the statistics of what a stage gets in both chains."""
        first, collector, sums = stage[0], CalibrationCollector(), _Sums()
        for index in range(len(self.calls)):
            self.step(f", {first}")
            others = self.calls.others(index, self.device)
            exact, quantized = (
                self.block.inputs([first], tensors, self._state(state, index), others)[first].flatten(0, -2)
                for tensors, state in ((self.source, self.chains.exact), (weights, self.chains.quantized))
            )
            collector.add(first, quantized)
            collector.samples += 1
            sums.add(exact, quantized)
        encoder = LayerEncoder.of(collector.result(), first, has_bias=has_bias).to(self.device)
        return StageInputs(sums, encoder, centered=has_bias)


class _Sums:
    """Sums over the inputs of a layer in both chains."""

    def __init__(self) -> None:
        self.count = 0
        self.products = self.cross = self.exact = self.quantized = torch.zeros(())

    def add(self, exact: Tensor, quantized: Tensor) -> None:
        """Add inputs, float32 (tokens, in_features), of the same tokens in both chains."""
        self.count += len(exact)
        self.products = self.products.to(exact.device) + quantized.mT @ quantized
        self.cross = self.cross.to(exact.device) + (exact - quantized).mT @ quantized
        self.exact = self.exact.to(exact.device) + exact.sum(0)
        self.quantized = self.quantized.to(exact.device) + quantized.sum(0)


class StageInputs:
    """What the layers of a stage get: the encoder for these inputs, and the corrections of weights and biases.

    Args:
        centered: the biases make up for the means, so that weights are corrected for what varies.
    """

    def __init__(self, sums: _Sums, encoder: LayerEncoder, *, centered: bool) -> None:
        self._sums, self.encoder = sums, encoder
        moments, self._cross = sums.products.clone(), sums.cross
        if centered:
            mean = sums.quantized / sums.count
            moments -= sums.quantized[:, None] * mean
            self._cross = sums.cross - (sums.exact - sums.quantized)[:, None] * mean
        moments.diagonal().add_(_RIDGE * moments.diagonal().mean().clamp(min=torch.finfo(moments.dtype).tiny))
        self._factor = torch.linalg.cholesky(moments)

    def corrected(self, weight: Tensor) -> Tensor:
        """Return the weight whose outputs in the quantized chain are nearest to those of `weight` in the exact one.

        Args:
            weight: float32, (out_features, in_features).
        """
        missing = weight @ self._cross
        return weight + torch.cholesky_solve(missing.mT, self._factor).mT

    def missing(self, weight: Tensor, rounded: Tensor) -> Tensor:
        """Return what the mean outputs of the rounded weight lack: float32, (out_features,).

        Args:
            weight, rounded: float32, (out_features, in_features).
        """
        return (weight @ self._sums.exact - rounded @ self._sums.quantized) / self._sums.count
