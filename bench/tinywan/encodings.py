"""TinyWan's weights after quantization to a recipe, by each method."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from wanquant.bench.comparison import decibels, output_error
from wanquant.bench.tinywan.activations import Rounding, rounding
from wanquant.bench.tinywan.data import Caption
from wanquant.bench.tinywan.equivalents import reordered
from wanquant.bench.tinywan.reference import Weights, collect, load_weights
from wanquant.quant import QTYPES, convert, open_gguf
from wanquant.quant.native.registry import NATIVE
from wanquant.quant.native.rotation import rotate
from wanquant.quant.plan.recipe import RECIPES
from wanquant.quant.qtype import Effort
from wanquant.quant.recovery.recovery_lora import recover
from wanquant.quant.safetensors.header import read_native_header
from wanquant.quant.sources.checkpoint import open_checkpoint
from wanquant.quant.statistics.calibration import Calibration, CalibrationCollector
from wanquant.quant.statistics.importance import Collector, Importance
from wanquant.quant.torch_op import int8_rows_into
from wanquant.quant.units import GIB
from wanquant.testing.kitchen import MissingLayoutError, kitchen_values
from wanquant.testing.libggml import load as load_libggml

LORA_SHARE = 0.05
"""Bytes of the recovery LoRA, relative to those of its file."""


@dataclass(frozen=True)
class Encoded:
    """The weights and the size of one file.

    Attributes:
        nbytes: of all that has to be loaded.
        weights: dequantized, float32.
        quantized: the names of the weights that were quantized.
        inputs: what quantizes the inputs of layers, by the names of their weights.
    """

    nbytes: int
    weights: Weights
    quantized: frozenset[str]
    inputs: Mapping[str, Rounding] = field(default_factory=dict)

    def weight_sqnr(self, source: Weights) -> float:
        """Return the SQNR of all quantized weights in dB."""
        noise = sum(float((self.weights[name] - source[name]).square().sum()) for name in self.quantized)
        return decibels(noise / sum(float(source[name].square().sum()) for name in self.quantized))

    def output_sqnr(self, source: Weights, products: Mapping[str, Tensor]) -> float:
        """Return the SQNR of the outputs in dB, with the relative errors averaged over the layers.

        Args:
            products: by the name of the weight, the means of x x^T over the inputs x, which end with a 1 for the bias:
                float32, (columns + 1, columns + 1).
        """

        names, biases = self.quantized & products.keys(), {n: f"{n.removesuffix('.weight')}.bias" for n in products}
        shifts = {n: self.weights[biases[n]] - source[biases[n]] for n in names}
        errors = (output_error(source[n], self.weights[n], products[n], shifts[n]) for n in names)
        return decibels(fmean(errors))


@dataclass(frozen=True)
class Workshop:
    """A temporary folder in which files of one network are made."""

    folder: Path
    checkpoint: Path
    source: Weights
    importance: Importance
    calibration: Calibration

    @classmethod
    @contextmanager
    def open(cls, captions: Sequence[Caption], order: int = 0) -> Iterator[Workshop]:
        """Open a workshop for TinyWan with its channels in an order, with statistics of these captions."""
        source = reordered(load_weights(), order)
        inputs = collect(source, captions, Collector(), CalibrationCollector())
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            checkpoint = folder / "tinywan.safetensors"
            save_file({name: tensor.bfloat16() for name, tensor in source.items()}, checkpoint)
            yield cls(folder, checkpoint, source, *inputs)

    def plain(self, recipe: str) -> Encoded:
        return self._converted(recipe, "plain", None)

    def weighted(self, recipe: str) -> Encoded:
        return self._converted(recipe, "importance", self.importance)

    def calibrated(self, recipe: str) -> Encoded:
        return self._converted(recipe, "calibrated", self.calibration)

    def int8(self, recipe: str) -> Encoded:
        """Convert as `plain`, and multiply in 8-bit integers as in long videos, where keys of the text are exact."""
        file = self.plain(recipe)
        names = {name for name in file.quantized if not name.endswith(("cross_attn.k.weight", "cross_attn.v.weight"))}
        rounded = {name: _in_int8(file.weights[name]) for name in names}
        return replace(file, weights={**file.weights, **rounded}, inputs=dict.fromkeys(names, rounding("INT8")))

    def thorough(self, recipe: str) -> Encoded:
        return self._converted(recipe, "thorough", self.calibration, "thorough")

    def narrow(self, recipe: str) -> Encoded:
        """Convert with covariances within 64 channels alone: wide models know most pairs of channels as little."""
        return self._converted(recipe, "narrow", within(self.calibration, 64))

    def ggml(self, recipe: str) -> Encoded:
        return self._by_ggml(recipe, {})

    def ggml_weighted(self, recipe: str) -> Encoded:
        return self._by_ggml(recipe, self.importance)

    def recovered(self, recipe: str) -> Encoded:
        """Convert with importance, and add a recovery LoRA."""
        file, lora = self.weighted(recipe), self.folder / f"{recipe}.safetensors"
        path, size = self._path(recipe, "importance"), LORA_SHARE * file.nbytes / GIB
        report = recover(path, self.checkpoint, lora, size, importance=self.importance, overwrite=True)
        factors, weights = load_file(lora), dict(file.weights)
        for layer in report.layers:
            key = f"diffusion_model.{layer.name.removesuffix('.weight')}"
            if layer.rank:
                up, down = factors[f"{key}.lora_B.weight"].float(), factors[f"{key}.lora_A.weight"].float()
                weights[layer.name] = weights[layer.name] + up @ down
                bias = f"{layer.name.removesuffix('.weight')}.bias"
                weights[bias] = weights[bias] + factors[f"{key}.diff_b"].float()
        return Encoded(file.nbytes + report.nbytes, weights, file.quantized)

    def _converted(self, recipe: str, method: str, importance: Importance | None, effort: Effort = "best") -> Encoded:
        path = self._path(recipe, method)
        report = convert(self.checkpoint, path, recipe, effort=effort, importance=importance)
        if RECIPES[recipe].is_native:
            return _of_native(path, report.nbytes)
        tensors = open_gguf(path).tensors
        quantized = frozenset(name for name, tensor in tensors.items() if tensor.qtype.block_size > 1)
        return Encoded(report.nbytes, {name: tensor.dequantize() for name, tensor in tensors.items()}, quantized)

    def kitchen(self, recipe: str) -> Encoded:
        """Quantize with comfy-kitchen, which calculates in the dtype of a weight: here in float32."""
        ours = self.plain(recipe)
        encoded = {name: kitchen_values(recipe, self.source[name]) for name in ours.quantized}
        return replace(ours, weights={**ours.weights, **encoded})

    def _by_ggml(self, recipe: str, importance: Mapping[str, Tensor]) -> Encoded:
        """Quantize with ggml's C library, to the types of our file."""
        ours, library = self.plain(recipe), load_libggml()
        tensors, weights = open_gguf(self._path(recipe, "plain")).tensors, dict(ours.weights)
        for name in ours.quantized:
            qtype = tensors[name].qtype.name
            columns = importance[name].numpy() if name in importance else None
            packed = library.quantize(qtype, self.source[name].numpy(), columns)
            weights[name] = torch.from_numpy(library.dequantize(qtype, packed))
        return Encoded(ours.nbytes, weights, ours.quantized)

    def _path(self, recipe: str, method: str) -> Path:
        """Return the path of a file, which a second conversion reuses."""
        return self.folder / f"{recipe}-{method}{RECIPES[recipe].suffix}"


def within(calibration: Calibration, channels: int) -> Calibration:
    """Return a calibration without the covariances of channels that lie in different runs of so many channels."""

    def kept(name: str, products: Tensor) -> Tensor:
        run, mean = torch.arange(products.shape[-1]) // channels, calibration.mean(name)
        assert mean is not None, "every collector measures it"
        column = mean.view(*products.shape[:2], 1)
        known = calibration.counts[name] * (column @ column.mT)
        return torch.where(run[:, None] == run, products, known)

    return replace(calibration, products={n: kept(n, p) for n, p in calibration.products.items()}, factors={})


def _in_int8(weight: Tensor) -> Tensor:
    """Return what products in 8-bit integers multiply with: float32 (rows, columns)."""
    codes, scales = torch.empty_like(weight, dtype=torch.int8), weight.new_empty(len(weight), 1)
    int8_rows_into(weight.contiguous().view(torch.uint8), "F32", codes, scales)
    return rotate(codes * scales)


def _of_native(path: Path, nbytes: int) -> Encoded:
    """Return a file in ComfyUI's own formats, with what they do to the inputs of layers on a GPU."""
    with open_checkpoint(path) as file:
        weights = {name: tensor.read().float().view(tensor.shape) for name, tensor in file.tensors.items()}
    stored = {
        name: record.stored.removesuffix(" (ComfyUI)") for name, record in read_native_header(path).tensors.items()
    }
    quantized = frozenset(name for name in weights if stored[name] in NATIVE)
    tensors = load_file(path)
    factors = {name: tensors.get(f"{name.removesuffix('weight')}pre_quant_scale") for name in quantized}
    return Encoded(nbytes, weights, quantized, {name: rounding(stored[name], factors[name]) for name in quantized})


Method = Callable[[Workshop, str], Encoded]
METHODS: dict[str, Method] = {
    "ggml": Workshop.ggml,
    "ggml + importance": Workshop.ggml_weighted,
    "plain": Workshop.plain,
    "int8": Workshop.int8,
    "importance": Workshop.weighted,
    "importance + LoRA": Workshop.recovered,
    "calibrated": Workshop.calibrated,
    "thorough": Workshop.thorough,
    "narrow": Workshop.narrow,
}
"""The methods to make a GGUF, by their names in the tables."""
NATIVE_METHODS: dict[str, Method] = {
    "kitchen": Workshop.kitchen,
    "plain": Workshop.plain,
    "calibrated": Workshop.calibrated,
}
"""The methods to make a file in one of ComfyUI's own formats."""


def methods_of(recipe: str) -> Mapping[str, Method]:
    """Return the methods to make a file of a recipe."""
    return NATIVE_METHODS if RECIPES[recipe].is_native else METHODS


def unavailable(recipe: str, method: str) -> str | None:
    """Return why a file cannot be made by a method here, or None."""
    if method == "kitchen":
        try:
            kitchen_values(recipe, torch.ones(16, 256))
        except MissingLayoutError as error:
            return f"{recipe} by kitchen is left out: {error}"
    if method == "ggml" and any(QTYPES[name].fast_in_c == "requires importance" for name in RECIPES[recipe].types):
        return f"{recipe} by ggml is left out: ggml cannot make it without an importance matrix"
    return None
